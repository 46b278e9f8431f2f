"""The gang on a real Ray cluster: two ranks that train a toy with gloo, disturbed in every way that must not matter."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from toy import Notes, toy_plan

from swift_dist.cluster.gang import Gang
from swift_dist.cluster.heartbeat import process_state
from swift_dist.cluster.interrupts import Interrupts
from swift_dist.cluster.placement import Demand, Placement
from swift_dist.cluster.plan import GangResult
from swift_dist.config.job import ClusterSection
from swift_dist.errors import JobError, RunError

pytestmark = pytest.mark.timeout(600)


@contextmanager
def gang_of(run_dir: Path, payload: dict[str, Any], notes: Notes, **settings: Any) -> Iterator[Gang]:
    plan = toy_plan(run_dir, payload, **settings)
    demand = Demand.of(plan.settings, len(plan.places), use_gpu=False)
    with (
        Placement(demand, timeout=100) as placement,
        Interrupts() as interrupts,
        Gang(plan, placement, interrupts, notes) as gang,
    ):
        yield gang


def run(run_dir: Path, payload: dict[str, Any], notes: Notes | None = None, **settings: Any) -> GangResult:
    with gang_of(run_dir, payload, notes or Notes(), **settings) as gang:
        return gang.run()


@pytest.fixture(scope="module")
def undisturbed(cluster: object, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the weights after 20 steps without any trouble."""
    result = run(tmp_path_factory.mktemp("undisturbed"), {"steps": 20})
    assert result.state == "done" and not result.failures
    assert result.results[0]["niceness"] == os.getpriority(os.PRIO_PROCESS, 0)
    assert result.results[0]["digest"] == result.results[1]["digest"]
    return result.results[0]["digest"]


def assert_same_end(result: GangResult, digest: str) -> None:
    assert result.state == "done"
    assert {r["digest"] for r in result.results.values()} == {digest}


@pytest.mark.parametrize(
    "fault",
    [
        {"rank": 0, "phase": "step", "step": 12, "do": "kill"},
        {"rank": 0, "phase": "build", "do": "kill"},
        # tests/system/test_kill.py does these to whole runs
        pytest.param({"rank": 1, "phase": "step", "step": 12, "do": "kill"}, marks=pytest.mark.table),
        pytest.param({"rank": 1, "phase": "build", "do": "kill"}, marks=pytest.mark.table),
        pytest.param({"rank": 0, "phase": "save", "step": 10, "do": "kill"}, marks=pytest.mark.table),
        pytest.param({"rank": 0, "phase": "final", "do": "kill"}, marks=pytest.mark.table),
    ],
    ids=lambda f: f"rank{f['rank']}-{f['phase']}",
)
def test_a_killed_rank_is_replaced_and_nothing_changes(undisturbed: str, tmp_path: Path, fault: dict) -> None:
    notes = Notes()
    began = time.monotonic()
    result = run(tmp_path, {"steps": 20, "faults": [fault]}, notes)
    assert_same_end(result, undisturbed)
    assert [(f.rank, f.kind) for f in notes.restarts] == [(fault["rank"], "died")]
    first_log = (tmp_path / "logs" / f"rank_{1 - fault['rank']}.log").read_text()
    pids = {line.rpartition(" ")[2] for line in first_log.splitlines() if ": rank " in line}
    if fault["phase"] not in ("final",):  # there the other rank may be gone from the entry already
        assert len(pids) == 1, "the survivor keeps its process"
    assert time.monotonic() - began < 200


@pytest.mark.table  # tests/system/test_kill.py does it to whole runs
def test_both_ranks_killed_twice(undisturbed: str, tmp_path: Path) -> None:
    faults = [
        {"rank": 0, "phase": "step", "step": 7, "do": "kill"},
        {"rank": 1, "phase": "step", "step": 7, "do": "kill"},
        {"rank": 1, "phase": "step", "step": 14, "do": "kill"},
    ]
    assert_same_end(run(tmp_path, {"steps": 20, "faults": faults}), undisturbed)


@pytest.mark.table  # tests/system/test_kill.py does it to whole runs
def test_a_stopped_rank_is_named_and_replaced(undisturbed: str, tmp_path: Path) -> None:
    notes = Notes()
    fault = {"rank": 1, "phase": "step", "step": 12, "do": "stop"}
    result = run(tmp_path, {"steps": 20, "faults": [fault]}, notes, stall_timeout=3.0)
    assert_same_end(result, undisturbed)
    (cause,) = notes.restarts
    assert (cause.rank, cause.kind, cause.step) == (1, "stalled", 12)
    assert "SIGSTOP" in cause.message
    stacks = tmp_path / "logs" / "stall-0"
    assert "state T" in (stacks / "rank_1.txt").read_text()
    assert "all_reduce" in (stacks / "rank_0.txt").read_text()


def test_a_rank_that_hangs_in_its_own_code_is_named(undisturbed: str, tmp_path: Path) -> None:
    notes = Notes()
    fault = {"rank": 0, "phase": "step", "step": 12, "do": "hang"}
    result = run(tmp_path, {"steps": 20, "faults": [fault]}, notes, stall_timeout=8.0)  # no step takes as long
    assert_same_end(result, undisturbed)
    assert [(f.rank, f.kind) for f in notes.restarts] == [(0, "stalled")]


def test_a_warm_spare_takes_the_place(undisturbed: str, tmp_path: Path) -> None:
    notes = Notes()
    fault = {"rank": 1, "phase": "step", "step": 18, "do": "kill", "after": str(tmp_path / "warm")}
    with gang_of(tmp_path, {"steps": 20, "faults": [fault]}, notes, spares=1) as gang:

        def tell_when_warm() -> None:
            while not (gang._spares.waiting and gang._spares.waiting[0].is_warm):
                time.sleep(0.02)
            (tmp_path / "warm").touch()

        threading.Thread(target=tell_when_warm, daemon=True).start()
        result = gang.run()
    assert_same_end(result, undisturbed)
    log = (tmp_path / "logs" / "rank_1.log").read_text()
    assert result.results[1]["attempt"] == 1 and "attempt 1: rank 1" in log
    assert gang.spares_used == 1


def test_a_spare_that_dies_while_it_waits_is_replaced(undisturbed: str, tmp_path: Path) -> None:
    notes, killed = Notes(), []
    payload = {"steps": 20, "step_seconds": 0.4}
    with gang_of(tmp_path, payload, notes, spares=1) as gang:

        def kill_the_first_spare() -> None:
            while not killed:
                time.sleep(0.02)
                beats = gang._beats
                killed.extend(s.name for s in gang._spares.waiting if beats.get(s.name) and beats[s.name].pid)
            os.kill(beats[killed[0]].pid, signal.SIGKILL)

        threading.Thread(target=kill_the_first_spare, daemon=True).start()
        result = gang.run()
        assert [spare.name for spare in gang._spares.waiting] not in ([], killed)
    assert_same_end(result, undisturbed)
    assert notes.restarts == []


def test_an_error_is_reported_once_with_rank_and_log(cluster: object, tmp_path: Path) -> None:
    fault = {"rank": 1, "phase": "step", "step": 3, "do": "raise", "times": 9}
    notes = Notes()
    with pytest.raises(RunError) as caught:
        run(tmp_path, {"steps": 20, "faults": [fault]}, notes)
    text = str(caught.value)
    assert text.count("ArithmeticError: asked for at step 3") == 2  # the sentence, and its one traceback's last line
    assert text.count("Traceback") == 1 and "Connection" not in text
    assert "rank 1 on " in text and "rank_1.log" in text
    assert "the same error came back at the same step" in text
    assert len(notes.restarts) == 1
    assert "ArithmeticError" in (tmp_path / "logs" / "rank_1.log").read_text()


def test_a_wrong_job_found_by_a_rank_is_a_job_error(cluster: object, tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        run(tmp_path, {"steps": 5, "faults": [{"rank": 0, "phase": "build", "do": "job"}]})
    assert (caught.value.key, caught.value.remedy) == ("train.steps", "do not ask for it")


def test_failures_are_limited(cluster: object, tmp_path: Path) -> None:
    fault = {"rank": 0, "phase": "step", "do": "kill", "times": 99}
    with pytest.raises(RunError, match=r"it failed 2 times and cluster\.max_failures is 1"):
        run(tmp_path, {"steps": 5, "faults": [fault]}, max_failures=1)


def test_ranks_see_the_environment_by_rule(cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    show = ["NCCL_ALGO", "SLURM_JOB_ID", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "LOCAL_RANK", "MINE"]
    result = run(tmp_path, {"steps": 1, "show": show}, env={"MINE": "yes"}, threads_per_rank=3)
    assert result.results[1]["environment"] == {
        "NCCL_ALGO": "Ring",
        "SLURM_JOB_ID": None,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "3",
        "LOCAL_RANK": "1",
        "MINE": "yes",
    }


@pytest.mark.table  # tests/system/test_kill.py does it to whole runs
def test_a_stop_request_checkpoints_and_ends(undisturbed: str, tmp_path: Path) -> None:
    notes = Notes()
    threading.Timer(0.1, until, [lambda: list((tmp_path / "checkpoints").glob("step_5.pt")), notes]).start()
    result = run(tmp_path, {"steps": 20, "step_seconds": 0.2}, notes)
    assert result.state == "interrupted"
    step = result.results[0]["step"]
    assert 5 <= step < 20 and (tmp_path / "checkpoints" / f"step_{step}.pt").exists()
    assert_same_end(run(tmp_path, {"steps": 20}), undisturbed)


def until(condition: Callable[[], object], notes: Notes) -> None:
    while not condition():
        time.sleep(0.02)
    notes.stop = True


def test_nothing_of_a_gang_runs_after_it(cluster: object, tmp_path: Path) -> None:
    result = run(tmp_path, {"steps": 2})
    deadline = time.monotonic() + 60
    pids = [r["pid"] for r in result.results.values()]
    while any(process_state(pid) not in ("", "Z") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [process_state(pid) for pid in pids if process_state(pid) not in ("", "Z")] == []
    assert os.getpid() not in pids


def test_an_unplaceable_job_says_what_is_missing(cluster: object) -> None:
    with pytest.raises(JobError, match=r"the job needs 3 nodes with 8 GPUs and 8 CPUs each; the cluster has 0 such"):
        Placement(Demand.of(ClusterSection(nnodes=3), 8, use_gpu=True), timeout=5)


def test_busy_resources_are_waited_for_only_so_long(cluster: object) -> None:
    demand = Demand.of(ClusterSection(), 2, use_gpu=False)
    with Placement(demand, timeout=100), pytest.raises(RunError, match=r"cluster\.placement_timeout"):
        Placement(demand, timeout=0.5)
