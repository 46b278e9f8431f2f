"""Learning-rate schedules and parameter groups, shared by both engines; the hf engine's optimizers."""

from swift_dist.optim.groups import decays
from swift_dist.optim.optimizers import make_optimizer
from swift_dist.optim.parameters import parameter_groups
from swift_dist.optim.schedule import Schedule, build_schedule

__all__ = ["Schedule", "build_schedule", "decays", "make_optimizer", "parameter_groups"]
