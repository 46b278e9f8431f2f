"""Loss spikes and NaNs: what to do about a step, decided as a value before its update is applied.

`decide` is a pure function of the policy, what came before and this step's numbers, which every rank has alike:
so all ranks decide the same without a message.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any, Literal

from swift_dist.config import TrainSection
from swift_dist.errors import RunError

WINDOW = 64
"""Accepted losses that the median is taken over."""
ENOUGH = 16
"""Accepted losses before a spike can be told from the noise of a start."""


class GuardError(RunError):
    """The run ends because of a NaN or a loss spike: raised at the same step on every rank, none of which is ill."""


@dataclass(frozen=True)
class Continue:
    """Apply the update."""


@dataclass(frozen=True)
class Skip:
    """Leave the update out, count it, go on with the next step."""

    reason: str


@dataclass(frozen=True)
class Stop:
    """End the run with `reason`; the weights stay as they were before this step."""

    reason: str
    remedy: str


Decision = Continue | Skip | Stop


@dataclass(frozen=True)
class GuardPolicy:
    """The keys of the train section that say what happens."""

    nan_policy: Literal["stop", "skip"] = "stop"
    spike_factor: float | None = None
    spike_policy: Literal["stop", "skip"] = "stop"
    max_skipped: int = 10

    @classmethod
    def of(cls, train: TrainSection) -> GuardPolicy:
        return cls(train.nan_policy, train.spike_factor, train.spike_policy, train.max_skipped)


@dataclass(frozen=True)
class GuardHistory:
    """What came before: the newest accepted losses and how many steps were skipped. Travels in the checkpoint."""

    losses: tuple[float, ...] = ()
    num_skipped: int = 0

    def after(self, decision: Decision, loss: float) -> GuardHistory:
        """The history once `decision` was carried out."""
        if isinstance(decision, Continue):
            return GuardHistory((*self.losses, loss)[-WINDOW:], self.num_skipped)
        return GuardHistory(self.losses, self.num_skipped + 1)

    def to_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "num_skipped": self.num_skipped}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GuardHistory:
        return cls(tuple(values["losses"]), values["num_skipped"])


def decide(
    policy: GuardPolicy,
    history: GuardHistory,
    *,
    step: int,
    global_batch_size: int,
    loss: float,
    grad_norm: float,
) -> Decision:
    """What to do about a step whose forward and backward gave `loss` and `grad_norm` (before clipping).

    Args:
        step: the step, counted from 1: its batch is samples (step-1)*GBS .. step*GBS-1 of the global order.
        global_batch_size: samples in one step.
    """
    first = (step - 1) * global_batch_size
    where = f"step {step} (samples {first}-{first + global_batch_size - 1} of the data order)"
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        what, name = (loss, "loss") if not math.isfinite(loss) else (grad_norm, "gradient norm")
        return _apply(policy.nan_policy, "nan_policy", f"{where}: the {name} is {what}", policy, history)
    if policy.spike_factor is None or len(history.losses) < ENOUGH:
        return Continue()
    median = statistics.median(history.losses)
    if loss <= policy.spike_factor * median:
        return Continue()
    reason = (
        f"{where}: loss {loss:.4g} is {loss / median:.2f} times the median {median:.4g} of the last "
        f"{len(history.losses)} steps (train.spike_factor {policy.spike_factor:g})"
    )
    return _apply(policy.spike_policy, "spike_policy", reason, policy, history)


def _apply(action: str, key: str, reason: str, policy: GuardPolicy, history: GuardHistory) -> Decision:
    if action == "stop":
        return Stop(
            reason,
            f"look at that batch, lower optimizer.lr, or go on past it with --train.{key} skip; "
            "the same command resumes from the newest checkpoint",
        )
    if history.num_skipped >= policy.max_skipped:
        return Stop(
            f"{reason}; {history.num_skipped} steps were skipped before it, which is train.max_skipped",
            "lower optimizer.lr or raise train.max_skipped",
        )
    return Skip(reason)
