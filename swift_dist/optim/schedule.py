"""Learning rate as a pure function of the step: nothing to save, nothing to restore. Shared by both engines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from swift_dist.config import ScheduleSection
from swift_dist.errors import JobError

Shape = Literal["cosine", "wsd", "linear", "constant"]


@dataclass(frozen=True)
class Schedule:
    """lr(step) for step = 0, 1, ...: the rate that update number `step` uses.

    Warm-up: peak * (step + 1) / (warmup_steps + 1), so that the first update already moves and update number
    warmup_steps has the peak rate. Then, with t in [0, 1] the fraction of the decay that has passed:

        cosine    min + (peak - min) * (1 + cos(pi t)) / 2    from the end of the warm-up to `end`
        linear    min + (peak - min) * (1 - t)                the same span
        wsd       peak, then the linear decay over the last `decay_steps` steps before `end`
        constant  peak

    After `end` the lowest rate min = peak * min_ratio stays (constant: the peak).

    Args:
        peak: highest rate.
        shape: see above.
        warmup_steps: updates below the peak.
        end: the step at which the lowest rate is reached.
        decay_steps: wsd only: the decay's length.
        min_ratio: lowest rate as a fraction of the peak.
    """

    peak: float
    shape: Shape
    warmup_steps: int
    end: int
    decay_steps: int
    min_ratio: float

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if self.shape == "constant":
            return self.peak
        start = self.end - self.decay_steps if self.shape == "wsd" else self.warmup_steps
        passed = min(max((step - start) / max(self.end - start, 1), 0.0), 1.0)
        share = (1 + math.cos(math.pi * passed)) / 2 if self.shape == "cosine" else 1 - passed
        lowest = self.peak * self.min_ratio
        return lowest + (self.peak - lowest) * share


def build_schedule(section: ScheduleSection, *, peak: float, train_steps: int) -> Schedule:
    """The schedule of a job that runs for `train_steps` updates.

    `schedule.decay_steps` is the step at which the lowest rate is reached (default: the last one), except for wsd,
    where it is the length of the decay (default: a tenth of the run).

    Raises:
        JobError: the warm-up and the decay do not fit.
    """
    wsd = section.name == "wsd"
    end = train_steps if wsd or section.decay_steps is None else section.decay_steps
    decay_steps = section.decay_steps if wsd and section.decay_steps is not None else max(train_steps // 10, 1)
    if section.name != "constant" and section.warmup_steps >= end:
        raise JobError(
            "schedule.warmup_steps",
            f"{section.warmup_steps} leaves nothing of the {end} steps for the {section.name} decay",
            "lower schedule.warmup_steps, raise train.steps, or use schedule.name: constant",
        )
    if wsd and section.warmup_steps + decay_steps > end:
        raise JobError(
            "schedule.decay_steps",
            f"warm-up {section.warmup_steps} and decay {decay_steps} are longer than the {end} steps",
            "lower one of them",
        )
    return Schedule(peak, section.name, section.warmup_steps, end, decay_steps, section.min_lr_ratio)
