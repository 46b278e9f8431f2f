"""The typed job configuration."""

from swift_dist.config.job import (
    CheckpointSection,
    ClusterSection,
    DataSection,
    DatasetEntry,
    JobConfig,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    ReportSection,
    ScheduleSection,
    TrainSection,
)
from swift_dist.config.section import Section

__all__ = [
    "CheckpointSection",
    "ClusterSection",
    "DataSection",
    "DatasetEntry",
    "JobConfig",
    "ModelSection",
    "OptimizerSection",
    "ParallelSection",
    "ReportSection",
    "ScheduleSection",
    "Section",
    "TrainSection",
]
