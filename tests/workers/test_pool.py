"""Units through real processes: results, what a worker's exceptions become, and that no process is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from swift_dist.errors import JobError, RunError
from swift_dist.workers import pool
from swift_dist.workers.pool import LocalWorker, from_queue, run_all, start_local
from tests.workers.toy import Odd, Toy

ROOT = Path(__file__).parents[2]


def results(units: list, workers: int = 2, task: Toy | None = None) -> list[Any]:
    """Of all units, in the order in which they were finished."""
    found: list[Any] = []
    run_all(from_queue(units), start_local(task or Toy(), workers), found.append)
    assert workers_of(os.getpid()) == []
    return found


def workers_of(parent: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [])[-2:] == ["swift_dist.workers.process", str(parent)]:
            found.append(process)
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def worker() -> Iterator[LocalWorker]:
    started = LocalWorker(Toy())
    yield started
    started.close()
    assert workers_of(os.getpid()) == []


def test_every_unit_is_done_once() -> None:
    found = results([("square", k) for k in range(200)])
    assert sorted(x for x in found if x is not None) == [k * k for k in range(200)]


def test_no_units_and_more_workers_than_units() -> None:
    assert [x for x in results([]) if x is not None] == []
    assert [x for x in results([("square", 3)], workers=3) if x is not None] == [9]


def test_a_unit_may_have_no_result() -> None:
    found = results([("nothing", 0), ("square", 2), ("nothing", 0)], workers=1)
    assert 4 in found and found.count(None) >= 2


def test_large_tasks_units_and_results() -> None:
    """Larger than a pipe: parent and worker write at the same time."""
    task, text = Toy(weight=bytes(3_000_000)), "x" * 1_000_000
    worker = LocalWorker(task)
    try:
        worker.submit(("run_error", text))
        worker.submit(("read", sys.executable))
        with pytest.raises(RunError, match=r"^x{1000000}\n"):
            worker.result()
        assert worker.result() == Path(sys.executable).read_bytes()
    finally:
        worker.close()


def test_a_worker_starts_light_with_one_thread_out_of_reach_of_ctrl_c(worker: LocalWorker) -> None:
    worker.submit(("about", None))
    assert worker.result() == {"loaded": [], "threads": "1", "session": True}


def test_as_many_units_as_workers_go_to_one_each() -> None:
    assert len({x for x in results([("who", 0.3)] * 3, workers=3) if x is not None}) == 3


def test_two_in_flight_and_a_list_for_each_thread() -> None:
    class Counting:
        """Finishes a unit when asked for its result."""

        in_flight = most = 0

        def submit(self, unit: Any) -> None:
            self.in_flight += 1
            self.most = max(self.most, self.in_flight)

        def result(self) -> str:
            self.in_flight -= 1
            return "done"

        def close(self) -> None:
            self.in_flight = -1

    left, lock = list(range(50)), threading.Lock()
    lists: dict[int, int] = {}

    def take(mine: list) -> int | None:
        with lock:
            lists.setdefault(threading.get_ident(), id(mine))
            assert lists[threading.get_ident()] == id(mine)
            return left.pop() if left else None

    workers, found = [Counting()], []
    run_all(take, workers, found.append)
    assert found.count("done") == 50 and workers[0].most == 2 and workers[0].in_flight == -1


def test_seen_is_called_while_nothing_is_finished() -> None:
    assert results([("who", 1.3)], workers=1).count(None) >= 2


def test_errors_of_the_commands_come_back_as_themselves(worker: LocalWorker) -> None:
    worker.submit(("job_error", "model.path"))
    worker.submit(("run_error", "something broke"))
    with pytest.raises(JobError) as job_error:
        worker.result()
    assert (job_error.value.key, job_error.value.message, job_error.value.remedy) == (
        *("model.path", "is wrong", "correct it"),
    )
    with pytest.raises(RunError) as run_error:
        worker.result()
    assert (run_error.value.message, run_error.value.remedy) == ("something broke", "do something")
    worker.submit(("square", 4))  # an error of a unit is not the worker's end
    assert worker.result() == 16


@pytest.mark.parametrize("unit", ["full", "over_quota"])
def test_a_full_disk(worker: LocalWorker, unit: str) -> None:
    worker.submit((unit, "/out/file"))
    with pytest.raises(RunError) as caught:
        worker.result()
    assert caught.value.message.startswith("the disk is full: ") and "/out/file" in caught.value.message
    assert caught.value.remedy == "free space and repeat the command: it goes on where it was"


def test_other_errors(worker: LocalWorker, tmp_path: Path) -> None:
    worker.submit(("read", str(tmp_path / "absent")))
    worker.submit(("bug", 1))
    with pytest.raises(RunError) as caught:
        worker.result()
    assert "absent" in caught.value.message and "Traceback" not in caught.value.message
    with pytest.raises(RunError) as caught:
        worker.result()
    assert caught.value.message.startswith("a worker failed:\nTraceback")
    assert "return x / 0" in caught.value.message and "ZeroDivisionError" in caught.value.message


def test_what_cannot_be_pickled_or_understood(worker: LocalWorker) -> None:
    for unit, reason in ((("lock", 0), "cannot pickle"), (("square", Odd()), "invalid literal for int")):
        worker.submit(unit)
        with pytest.raises(RunError, match=reason):
            worker.result()
    worker.submit(("square", 5))
    assert worker.result() == 25


def test_a_task_that_cannot_start() -> None:
    with pytest.raises(JobError, match="the toy cannot start"):
        results([("square", 1)], task=Toy(fails=True))


def test_the_first_error_ends_everything() -> None:
    begin = time.monotonic()
    with pytest.raises(RunError, match="boom"):
        results([("who", 600), ("run_error", "boom")])
    assert time.monotonic() - begin < 200
    assert workers_of(os.getpid()) == []


def test_what_take_raises_ends_everything() -> None:
    def units() -> Iterator[tuple[str, int]]:
        yield "square", 1
        raise RunError("no more")

    with pytest.raises(RunError, match="no more"):
        run_all(from_queue(units()), start_local(Toy(), 2), lambda result: None)
    assert workers_of(os.getpid()) == []


def test_a_worker_that_dies() -> None:
    started = start_local(Toy(), 2)
    killed: list[int] = []

    def seen(result: int | None) -> None:
        if result is not None and not killed:
            killed.append(result)
            os.kill(result, signal.SIGKILL)

    with pytest.raises(RunError, match="a worker process was killed by signal 9") as caught:
        run_all(from_queue([("who", 0.1)] * 50), started, seen)
    assert caught.value.remedy.startswith("repeat the command: it goes on where it was; if memory ran out")
    with pytest.raises(RunError, match="a worker process ended with code 7") as caught:
        results([("end", 7)])
    assert caught.value.remedy == "repeat the command: it goes on where it was"
    assert workers_of(os.getpid()) == []


def test_all_or_none_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    class Third(LocalWorker):
        made = 0

        def __init__(self, task: pool.Task) -> None:
            Third.made += 1
            if Third.made == 3:
                raise OSError("no more processes")
            super().__init__(task)

    monkeypatch.setattr(pool, "LocalWorker", Third)
    with pytest.raises(OSError, match="no more processes"):
        start_local(Toy(), 4)
    assert Third.made == 3 and workers_of(os.getpid()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    code = f"""
from swift_dist.workers.pool import from_queue, run_all, start_local
from tests.workers.toy import Toy
run_all(from_queue([("sleep_in", {str(tmp_path)!r})] * 9), start_local(Toy(), 2), lambda result: None)
"""
    run = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background may ignore it
    )  # fmt: skip
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    assert sorted(process.pid for process in workers_of(run.pid)) == sorted(int(p.name) for p in tmp_path.iterdir())
    run.send_signal(number)
    assert run.wait(timeout=100) == -number
    assert run.stderr and ("KeyboardInterrupt" in run.stderr.read()) == (number == signal.SIGINT)
    if number == signal.SIGINT:  # ended before the parent ends
        assert workers_of(run.pid) == []
    wait_for(lambda: workers_of(run.pid) == [])
