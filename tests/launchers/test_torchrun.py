"""Where the nodes of a job without Ray meet, and what each looks at before. (Whole runs: tests/system.)"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from swift_dist.config import JobConfig
from swift_dist.config.load import build
from swift_dist.errors import JobError, RunError
from swift_dist.launchers.torchrun import LAUNCHER, PORTS, first_port
from swift_dist.runs.files import write_json
from swift_dist.runs.folder import RunFolder
from swift_dist.torchrun import driver
from swift_dist.torchrun.meeting import NAME, Meeting, found, served
from swift_dist.torchrun.reports import Reports


def job(output: Path, rank: int = 0, **launch: Any) -> JobConfig:
    cluster = {"nnodes": 2, "nproc_per_node": 1, "accelerator": "cpu", "rendezvous_timeout": 2}
    values = {"output": str(output), "cluster": cluster, "launch.torchrun": {"node_rank": rank, **launch}}
    return build(JobConfig, [values])


def begun(job: JobConfig) -> RunFolder:
    folder = RunFolder.for_job(job)
    folder.begin(job)
    return folder


def test_two_jobs_that_want_one_port_get_two(tmp_path: Path) -> None:
    """Bound and kept: the second finds the first's in use and takes the next."""
    here, host = job(tmp_path / "run"), socket.gethostname()
    folder = begun(here)
    with served(here, folder) as one, served(here, folder) as two:
        ports = [int(str(meeting.endpoint).removeprefix(f"{host}:")) for meeting in (one, two)]
        assert ports[0] != ports[1] and set(ports) <= set(PORTS)
        first = PORTS[first_port(folder.path)]
        for port in {first, *ports}:
            with pytest.raises(OSError, match="in use"):
                socket.create_server(("", port))
        two.publish(folder)
        assert found(job(tmp_path / "run", 1), folder).endpoint == two.endpoint
    assert not (folder.path / NAME).exists()


def test_a_port_that_was_asked_for_is_taken_or_refused(tmp_path: Path) -> None:
    with contextlib.closing(socket.create_server(("", 0))) as other:
        asked = f"127.0.0.1:{other.getsockname()[1]}"
        here = job(tmp_path / "run", endpoint=asked)
        with pytest.raises(JobError, match="is in use on this node"), served(here, RunFolder.for_job(here)):
            pass
    assert not (tmp_path / "run").exists()
    with served(here, begun(here)) as meeting:
        assert meeting.endpoint == asked


def test_what_a_killed_driver_left_is_not_believed(tmp_path: Path) -> None:
    here = job(tmp_path / "run")
    folder = begun(here)
    place = {"endpoint": "n1:1", "driver": {**json.loads(folder.status_path.read_text())["driver"], "pid": 1}}
    (folder.path / NAME).write_text(json.dumps(place))
    with pytest.raises(JobError, match="nobody has begun a run"):
        found(job(tmp_path / "run", 1), folder)


def test_a_node_that_is_not_fit_ends_the_job_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second node has another version of torch than the first noted in the manifest."""
    here = job(tmp_path / "run", endpoint="127.0.0.1")
    folder = begun(here)
    manifest = folder.manifest()
    folder.manifest_path.write_text(json.dumps({**manifest, "versions": {**manifest["versions"], "torch": "1.0"}}))
    with served(here, folder) as meeting:
        meeting.publish(folder)
        assert not meeting.heard()
        resolved = type("Resolved", (), {"job": job(tmp_path / "run", 1)})
        with pytest.raises(RunError, match=r"torch .* \(wanted: 1.0\)"):
            driver._follow(folder, resolved, False, None)  # type: ignore[arg-type]
        (refusal,) = meeting.heard()
    assert refusal["kind"] == "run"
    assert refusal["message"].startswith(f"{socket.gethostname()}: the nodes are not fit for this job")


@dataclass
class Layout:
    tp: int = 1


class Waiting:
    """torchrun, waiting for the other node."""

    def poll(self) -> None:
        return None


INTERRUPTS: Any = type("Interrupts", (), {"graceful": False, "requested": False, "insistent": False})


def end(kind: str, message: str, rank: int = 0) -> dict[str, Any]:
    who = {"rank": rank, "attempt": 0}
    return {"kind": kind, **who, "key": "", "message": message, "remedy": "", "time": time.time()}


def place(rank: int) -> dict[str, Any]:
    return {"kind": "place", "rank": rank, "attempt": 0, "host": f"n{rank}", "threads": 2}


def test_the_first_node_is_told_while_it_waits(tmp_path: Path) -> None:
    """Where the other's ranks are, and why one of them failed: the cause, though the first's own ranks fell before."""
    here = job(tmp_path / "run", endpoint="127.0.0.1")
    folder = begun(here)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with served(here, folder) as meeting:
        ours, theirs = Reports(tmp_path / "one", meeting), Reports(tmp_path / "two", Meeting(meeting.endpoint))
        assert ours.of_all and not theirs.of_all
        write_json(tmp_path / "one" / "place_0.json", place(0))
        write_json(tmp_path / "one" / "rank_0.json", end("communication", "connection closed by peer"))
        write_json(tmp_path / "two" / "place_1.json", place(1))
        theirs.read()
        theirs.read()  # nothing new
        assert len(meeting.heard()) == 1
        write_json(tmp_path / "two" / "rank_1.json", end("run", "the loss is nan", 1))
        threading.Timer(0.5, theirs.read).start()
        driver._wait(Waiting(), folder, INTERRUPTS, ours, 1, 2)  # type: ignore[arg-type]
        with pytest.raises(RunError, match="the loss is nan"):
            driver._outcome(ours.ends, INTERRUPTS)
    (attempt,) = folder.manifest()["attempts"]
    assert (attempt["hosts"], attempt["threads_per_rank"]) == (["n0", "n1"], [2, 2])


def test_a_lost_rank_of_another_node_ends_the_first_one_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no collective notices."""
    monkeypatch.setattr(driver, "_WORD_SECONDS", 0.5)
    here = job(tmp_path / "run", endpoint="127.0.0.1")
    folder = begun(here)
    with served(here, folder) as meeting:
        ours, other = Reports(tmp_path, meeting), Meeting(meeting.endpoint)
        assert not other.is_first and (meeting.address, other.address) == ("127.0.0.1", "127.0.0.1")
        other.tell(driver._word("error", "rank 1 on n1 ended without a word"))
        driver._wait(Waiting(), folder, INTERRUPTS, ours, 1, 2)  # type: ignore[arg-type]
        with pytest.raises(RunError, match="rank 1 on n1 ended without a word"):
            driver._outcome(ours.ends, INTERRUPTS)


def test_ranks_that_have_ended_are_not_kept_waiting_by_other_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun would wait for an agent that was killed for five minutes."""
    monkeypatch.setattr(driver, "_VERDICT_SECONDS", 0.5)
    here = job(tmp_path / "run", endpoint="127.0.0.1")
    folder = begun(here)
    with served(here, folder) as meeting:
        ours = Reports(tmp_path, meeting)
        write_json(tmp_path / "place_0.json", place(0))
        ours.read()
        assert [silent["rank"] for silent in ours.silent()] == [0]
        result = {"step": 3, "loss": 1.0, "stopped": True, "checkpoint": 3}
        write_json(tmp_path / "rank_0.json", {"kind": "result", "rank": 0, "attempt": 0, "result": result})
        driver._wait(Waiting(), folder, INTERRUPTS, ours, 1, 2)  # type: ignore[arg-type]
        assert ours.silent() == [] and driver._outcome(ours.ends, INTERRUPTS)["state"] == "interrupted"


def test_a_node_that_did_not_come_is_missed(tmp_path: Path) -> None:
    here = job(tmp_path / "run", endpoint="127.0.0.1")
    with served(here, begun(here)) as meeting, pytest.raises(RunError, match="not all of the 2 nodes came within 2 s"):
        driver._require_met(here, Reports(tmp_path, meeting), INTERRUPTS)


def test_another_job_on_another_node_is_refused_on_both(tmp_path: Path) -> None:
    here = job(tmp_path / "run", endpoint="127.0.0.1")
    folder = begun(here)
    other = build(JobConfig, [{**job(tmp_path / "run", 1).model_dump(exclude_defaults=True), "optimizer.lr": 0.5}])
    with served(here, folder) as meeting:
        meeting.publish(folder)
        with pytest.raises(JobError, match=r"optimizer.lr: --optimizer.lr=0.5 on this node, not given on the first"):
            driver._follow(folder, type("Resolved", (), {"job": other}), False, INTERRUPTS)  # type: ignore[arg-type]
        (word,) = meeting.heard()
    assert word["kind"] == "run" and "optimizer.lr" in word["message"]


def test_who_waits_for_the_first_node_hears_of_its_failure(tmp_path: Path) -> None:
    here = job(tmp_path / "run")
    folder = begun(here)
    folder.end("failed", message="of yesterday")
    with pytest.raises(JobError, match=r"nobody has begun .* the last attempt in it has failed: of yesterday"):
        found(job(tmp_path / "run", 1), folder)
    folder.begin(here)
    threading.Timer(0.5, folder.end, ["failed"], {"message": "its disk is full"}).start()
    with pytest.raises(RunError, match="failed on the first node: its disk is full"):
        found(job(tmp_path / "run", 1), folder)


def test_the_other_nodes_end_when_the_first_has_and_say_why(tmp_path: Path) -> None:
    here = job(tmp_path / "run", endpoint="127.0.0.1")
    folder = begun(here)
    (tmp_path / "two").mkdir()
    with served(here, folder) as meeting:
        theirs = Reports(tmp_path / "two", Meeting(meeting.endpoint))
        threading.Timer(0.5, folder.end, ["failed"], {"message": "its disk is full"}).start()
        driver._wait(Waiting(), folder, INTERRUPTS, theirs, 1, 2)  # type: ignore[arg-type]
        with pytest.raises(RunError, match="its disk is full"):
            driver._raise_what_the_first_node_says(folder)


def test_a_first_node_that_is_not_fit_says_so_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unfit(job: JobConfig, versions: object = None) -> None:
        raise RunError("the nodes are not fit for this job: its disk is full", "")

    monkeypatch.setattr(driver, "preflight_here", unfit)
    here = job(tmp_path / "run", endpoint="127.0.0.1")
    folder = RunFolder.for_job(here)
    resolved = type("Resolved", (), {"job": here, "layout": Layout(), "encoding": None})
    with pytest.raises(RunError, match="its disk is full"):
        driver._lead(folder, resolved, False, INTERRUPTS)  # type: ignore[arg-type]
    status = folder.status()
    assert status and status.state == "failed" and "its disk is full" in status.message
    assert not (folder.path / NAME).exists()


def test_keys_that_do_nothing_here_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    driver._warn_of_what_is_the_gangs(job(tmp_path / "run"))
    assert caplog.text == ""
    driver._warn_of_what_is_the_gangs(build(JobConfig, [{"cluster": {"spares": 1, "stall_timeout": 9}}]))
    assert "cluster.spares does nothing under torchrun" in caplog.text and "cluster.stall_timeout" in caplog.text


def test_the_artefact_is_a_line_for_each_node(tmp_path: Path) -> None:
    lines = LAUNCHER.render(job(tmp_path / "run")).splitlines()
    assert [line.rpartition("# on node ")[2] for line in lines] == ["0", "1"]
    assert "node_rank" not in lines[0] and "--launch.torchrun.node_rank=1" in lines[1]
    assert all("--launcher torchrun" in line for line in lines)


@pytest.mark.parametrize(
    ("rank", "endpoint", "key"),
    [(2, "n1", "node_rank"), (0, "n1:x", "endpoint"), (0, ":1", "endpoint"), (0, "n1:70000", "endpoint")],
)
def test_wrong_words(tmp_path: Path, rank: int, endpoint: str, key: str) -> None:
    with pytest.raises(JobError) as caught:
        LAUNCHER.submit(job(tmp_path / "run", rank, endpoint=endpoint))
    assert caught.value.key == f"launch.torchrun.{key}"
