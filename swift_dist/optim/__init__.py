"""Learning-rate schedules and parameter groups, shared by both engines."""

from swift_dist.optim.groups import decays
from swift_dist.optim.schedule import Schedule, build_schedule

__all__ = ["Schedule", "build_schedule", "decays"]
