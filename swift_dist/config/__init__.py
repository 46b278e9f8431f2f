"""The typed job configuration.

``JobConfig`` knows the options of every plug-in, whose files in turn are made of ``Section``s: so it is put together
when it is first asked for, not when a plug-in's file imports this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from swift_dist.config.section import Section

if TYPE_CHECKING:
    from swift_dist.config.finetune import StrategySection, TemplateSection
    from swift_dist.config.job import (
        CheckpointSection,
        ClusterSection,
        DataSection,
        DatasetEntry,
        JobConfig,
        ModelSection,
        ObjectiveSection,
        OptimizerSection,
        ParallelSection,
        ReportSection,
        ScheduleSection,
        TrainSection,
        TunerSection,
    )

__all__ = [
    "CheckpointSection",
    "ClusterSection",
    "DataSection",
    "DatasetEntry",
    "JobConfig",
    "ModelSection",
    "ObjectiveSection",
    "OptimizerSection",
    "ParallelSection",
    "ReportSection",
    "ScheduleSection",
    "Section",
    "StrategySection",
    "TemplateSection",
    "TrainSection",
    "TunerSection",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(name)
    from swift_dist.config import job

    return getattr(job, name)
