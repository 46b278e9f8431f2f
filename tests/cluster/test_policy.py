"""Restart decisions: values from values, without a cluster."""

from __future__ import annotations

import pytest

from swift_dist.cluster.failures import Failure, is_communication_error, is_device_error
from swift_dist.cluster.heartbeat import Beat
from swift_dist.cluster.policy import (
    Finish,
    GiveUp,
    Restart,
    Stall,
    StallLimits,
    decide,
    find_stall,
    name_laggards,
    root_cause,
)


def died(rank: int, time: float = 10.0) -> Failure:
    return Failure(rank, "died", "gone", time=time)


def lost_peer(rank: int, time: float = 9.0) -> Failure:
    return Failure(rank, "communication", "Connection closed by peer", time=time, reusable=True)


def error(rank: int, message: str = "ValueError: x", step: int = 3, time: float = 9.0) -> Failure:
    return Failure(rank, "error", message, step=step, time=time, reusable=True)


def test_no_failure_finishes() -> None:
    assert decide([], [], 3) == Finish()


def test_a_death_replaces_the_dead_and_keeps_the_survivors() -> None:
    cause = died(2)
    assert decide([lost_peer(0), lost_peer(1), cause, lost_peer(3)], [], 3) == Restart((2,), cause)


def test_survivors_that_are_not_safe_are_replaced_too() -> None:
    broken = Failure(1, "communication", "NCCL error", reusable=False)
    silent = Failure(3, "unresponsive", "silent")
    decision = decide([lost_peer(0), broken, died(2), silent], [], 3)
    assert isinstance(decision, Restart) and decision.replace == (1, 2, 3)


def test_failures_are_counted() -> None:
    assert isinstance(decide([died(0)], [died(0), died(1)], 3), Restart)
    decision = decide([died(0)], [died(0), died(1), died(0)], 3)
    assert isinstance(decision, GiveUp) and "failed 4 times" in decision.reason
    assert isinstance(decide([died(0)], [], 0), GiveUp)


def test_the_same_error_at_the_same_step_gives_up_at_once() -> None:
    decision = decide([error(1)], [error(0)], 99)
    assert isinstance(decision, GiveUp) and "same error" in decision.reason
    assert isinstance(decide([error(1, step=4)], [error(0)], 99), Restart)
    assert isinstance(decide([error(1, message="KeyError: y")], [error(0)], 99), Restart)
    assert isinstance(decide([error(1)], [error(0), died(1)], 99), Restart), "only twice in a row"


@pytest.mark.parametrize("kind", ["job", "run"])
def test_a_deliberate_end_is_not_tried_again(kind: str) -> None:
    failure = Failure(0, kind, "wrong", key="a.b", time=11.0, reusable=True)  # type: ignore[arg-type]
    decision = decide([lost_peer(1), failure, error(2)], [], 3)
    assert decision == GiveUp("", failure)


def test_a_deliberate_end_that_follows_a_death_is_its_consequence() -> None:
    writers = Failure(0, "run", "a checkpoint writer failed on rank 1", time=11.0, reusable=True)
    assert root_cause([writers, died(1, time=12.0)]) == died(1, time=12.0)


@pytest.mark.parametrize(
    ("failures", "rank"),
    [
        ([lost_peer(0, 1.0), error(1, time=1.1), lost_peer(2, 0.9)], 1),
        ([error(0, time=5.0), error(1, time=4.0)], 1),
        ([error(0, time=9.5), died(1, time=10.0)], 1),  # the error came just before the news of the death
        ([error(0, time=5.0), died(1, time=10.0)], 0),  # the error was there long before
        ([lost_peer(0, 2.0), lost_peer(1, 1.0)], 1),
        ([Failure(0, "unresponsive", "", time=1.0), lost_peer(1, 2.0)], 1),
        ([Failure(0, "stalled", "", time=3.0), lost_peer(1, 2.0)], 0),
    ],
)
def test_the_root_cause_is_not_a_consequence(failures: list[Failure], rank: int) -> None:
    assert root_cause(failures).rank == rank


def beat(step: int = 5, phase: str = "step", age: float = 0.0, median: float | None = 0.5, state: str = "S") -> Beat:
    return Beat(pid=1, step=step, phase=phase, age=age, median_step=median, state=state)


LIMITS = StallLimits(step=None, start=120.0)


@pytest.mark.parametrize(
    ("median", "limit"), [(0.01, 60.0), (5.9, 60.0), (6.1, 61.0), (100.0, 1000.0)], ids=lambda x: str(x)
)
def test_a_step_may_take_ten_medians_and_at_least_a_minute(median: float, limit: float) -> None:
    assert find_stall({0: beat(age=limit - 0.1, median=median), 1: beat(age=limit + 9, median=median)}, LIMITS) is None
    stall = find_stall({0: beat(age=limit + 0.1, median=median), 1: beat(age=limit + 9, median=median)}, LIMITS)
    assert stall == Stall((), limit + 0.1, "step", 5)


def test_the_rank_behind_is_named() -> None:
    beats = {0: beat(age=70), 1: beat(step=4, age=71), 2: beat(age=70)}
    stall = find_stall(beats, LIMITS)
    assert stall is not None and stall.laggards == (1,)
    saving = find_stall({0: beat(phase="step", age=4000), 1: beat(phase="save", age=4000)}, LIMITS)
    assert saving is not None and saving.laggards == (0,)


def test_a_stopped_process_is_a_stall_in_any_phase() -> None:
    for phase in ("import", "build", "load", "step", "eval", "save", "final"):
        beats = {0: beat(phase=phase, age=0.1), 1: beat(phase=phase, age=61, state="T")}
        assert find_stall(beats, LIMITS) == Stall((1,), 61, phase, 5), phase
    assert find_stall({0: beat(), 1: beat(age=59, state="T")}, LIMITS) is None


@pytest.mark.parametrize(
    ("phase", "limit"), [("import", 120.0), ("build", 1200.0), ("load", 1200.0), ("eval", 1800.0), ("save", 1800.0)]
)
def test_phases_other_than_steps_have_limits_of_their_own(phase: str, limit: float) -> None:
    assert find_stall({0: beat(phase=phase, age=limit - 1)}, LIMITS) is None
    assert find_stall({0: beat(phase=phase, age=limit + 1)}, LIMITS) is not None


def test_the_first_step_may_take_long_unless_the_job_says_otherwise() -> None:
    assert find_stall({0: beat(age=599, median=None)}, LIMITS) is None
    assert find_stall({0: beat(age=601, median=None)}, LIMITS) is not None
    assert find_stall({0: beat(age=6, median=None)}, StallLimits(step=5.0, start=120.0)) is not None
    assert find_stall({0: beat(age=6, median=100.0)}, StallLimits(step=5.0, start=120.0)) is not None


def test_a_rank_that_never_spoke_counts_from_the_start() -> None:
    assert find_stall({0: Beat(age=119)}, LIMITS) is None
    assert find_stall({0: Beat(age=121)}, LIMITS) is not None
    assert find_stall({}, LIMITS) is None


WAITING = (
    'Thread 1 (idle): "MainThread"\n    all_reduce (torch/distributed/distributed_c10d.py:3252)\n    main (x.py:1)\n'
)
BUSY = (
    'Thread 1 (active): "MainThread"\n    work (model.py:3)\n    main (x.py:1)\nThread 2 (idle): "x"\n    w (t.py:1)\n'
)


def test_where_no_step_differs_the_stacks_name_the_laggard() -> None:
    stall = Stall((), 61, "step", 5)
    assert name_laggards(stall, {0: WAITING, 1: BUSY, 2: WAITING}) == (1,)
    assert name_laggards(stall, {0: WAITING, 1: WAITING}) == ()
    assert name_laggards(stall, {0: BUSY, 1: BUSY}) == ()
    assert name_laggards(Stall((2,), 61, "step", 5), {0: WAITING, 1: BUSY}) == (2,)


def test_errors_are_sorted_by_what_they_say_of_the_process() -> None:
    gloo = (
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer"
    )
    assert is_communication_error(RuntimeError(gloo))
    assert is_communication_error(ConnectionResetError())
    assert not is_communication_error(ValueError("Connection reset by peer is a fine sentence"))
    assert not is_communication_error(RuntimeError("shape mismatch"))
    try:
        raise RuntimeError("the save failed") from RuntimeError(gloo)
    except RuntimeError as wrapped:
        assert is_communication_error(wrapped)
    assert is_device_error(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_device_error(RuntimeError(gloo))
