"""Restart decisions as values. Nothing here touches a cluster or a clock: all is given, all is returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from swift_dist.cluster.failures import Failure
from swift_dist.cluster.heartbeat import PHASES, Beat

_DIED_NOTICED_LATE = 2.0
"""Seconds by which the news of a death may trail its consequences in other ranks."""


@dataclass(frozen=True)
class Finish:
    """All ranks returned."""


@dataclass(frozen=True)
class Restart:
    """Start the next attempt; ranks in `replace` get another process, the others keep theirs."""

    replace: tuple[int, ...]
    cause: Failure


@dataclass(frozen=True)
class GiveUp:
    """End the run: `reason` says why another attempt would not help."""

    reason: str
    cause: Failure


Decision = Finish | Restart | GiveUp


def root_cause(failures: Sequence[Failure]) -> Failure:
    """The failure that explains the others.

    A wrong job or an end on purpose first. Then the earliest death, stall or own error: a death counts as earlier than
    it was noticed. Errors of communication and silence are consequences, and chosen only where there is nothing else.
    """

    def order(failure: Failure) -> tuple[int, float]:
        deliberate = {"job": 0, "run": 1}
        if failure.kind in deliberate and not any(f.kind in ("died", "stalled") for f in failures):
            return deliberate[failure.kind], failure.time
        if failure.kind in ("died", "stalled"):
            return 2, failure.time - _DIED_NOTICED_LATE
        if failure.kind in ("error", "job", "run"):
            return 2, failure.time
        return (3 if failure.kind == "communication" else 4), failure.time

    return min(failures, key=order)


def decide(failures: Sequence[Failure], history: Sequence[Failure], max_failures: int) -> Decision:
    """What follows an attempt.

    Args:
        failures: of this attempt, at most one a rank; empty: all ranks returned.
        history: the root causes of the attempts before, oldest first.
        max_failures: attempts that may fail before the run does.
    """
    if not failures:
        return Finish()
    cause = root_cause(failures)
    if cause.kind in ("job", "run"):
        return GiveUp("", cause)
    if cause.kind == "error" and history and _same(cause, history[-1]):
        return GiveUp("the same error came back at the same step: starting again would not help", cause)
    if len(history) >= max_failures:
        used = f"it failed {len(history) + 1} times" if history else "it failed"
        return GiveUp(f"{used} and cluster.max_failures is {max_failures}", cause)
    return Restart(tuple(sorted(f.rank for f in failures if not f.reusable)), cause)


def _same(one: Failure, other: Failure) -> bool:
    return other.kind == "error" and (one.message, one.step) == (other.message, other.step)


@dataclass(frozen=True)
class StallLimits:
    """Seconds of silence after which a gang counts as stalled.

    Attributes:
        step: `cluster.stall_timeout`, or None: 10 x the median step, at least 60 s.
        start: for ranks that import (`cluster.rendezvous_timeout`); building and loading may take 10 times as long.
    """

    step: float | None
    start: float

    def of(self, beats: Sequence[Beat], phase: str) -> float:
        """The limit for a rank in `phase`, given what all ranks say about their steps."""
        if phase in ("idle", "import"):
            return self.start
        if phase in ("build", "load"):
            return 10 * self.start
        if phase == "step":
            knows_steps = self.step or any(b.median_step for b in beats)
            return self.of_step(beats) if knows_steps else 600.0  # the first one compiles, allocates and connects
        return max(10 * self.of_step(beats), 1800.0)  # an evaluation or a checkpoint may be long

    def of_step(self, beats: Sequence[Beat]) -> float:
        """The limit for an ordinary step."""
        medians = [b.median_step for b in beats if b.median_step]
        return self.step or max(60.0, 10 * median(medians) if medians else 0.0)


@dataclass(frozen=True)
class Stall:
    """Nobody has moved for too long. `laggards` are the ranks that stand out; empty: none does."""

    laggards: tuple[int, ...]
    seconds: float
    phase: str
    step: int


def find_stall(beats: Mapping[int, Beat], limits: StallLimits) -> Stall | None:
    """Whether the gang hangs, from what every unfinished rank last said.

    A rank that the kernel holds stopped (state T) longer than a step may take is a stall whatever it was doing.
    Otherwise the gang hangs when every rank has been silent for its phase's limit: the slowest of a working gang
    speaks at least that often, and ranks that wait for it are silent only as long as it is.
    """
    if not beats:
        return None
    everyone = list(beats.values())
    stopped_limit = limits.of_step(everyone)
    stopped = [rank for rank, b in beats.items() if b.state in ("T", "t") and b.age > stopped_limit]
    if stopped:
        first = beats[stopped[0]]
        return Stall(tuple(stopped), first.age, first.phase, first.step)
    if not all(b.age > limits.of(everyone, b.phase) for b in everyone):
        return None
    behind = min(everyone, key=lambda b: (b.step, PHASES.index(b.phase)))
    laggards = tuple(r for r, b in beats.items() if (b.step, b.phase) == (behind.step, behind.phase))
    named = laggards if len(laggards) < len(beats) else ()
    return Stall(named, min(b.age for b in everyone), behind.phase, behind.step)


def name_laggards(stall: Stall, stacks: Mapping[int, str]) -> tuple[int, ...]:
    """The ranks that stand out; if none does by its step, those whose main thread is not waiting for the others."""
    if stall.laggards:
        return stall.laggards
    busy = tuple(rank for rank, stack in stacks.items() if not _waits_for_peers(stack))
    return busy if len(busy) < len(stacks) else ()


def _waits_for_peers(stack: str) -> bool:
    """Whether a py-spy dump shows the main thread inside torch's collectives."""
    _, _, main = stack.partition('"MainThread"')
    frames = [line for line in main.split("\nThread")[0].splitlines() if line.startswith("    ")]
    return any("torch/distributed/" in frame or "torch/autograd/graph" in frame for frame in frames[:4])
