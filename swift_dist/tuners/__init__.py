"""Tuners, one file each: ``swift_dist/tuners/<name>.py`` holds an ``Options`` and a ``TUNER``. `find_tuners` makes one
of those that a job names, `merge` takes an adapter into the weights of its base."""

from swift_dist.tuners._merge import merge
from swift_dist.tuners._stack import TunerStack, find_tuners

__all__ = ["TunerStack", "find_tuners", "merge"]
