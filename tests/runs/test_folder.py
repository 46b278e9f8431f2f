"""The run folder: layout, who holds it, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from swift_dist.config import JobConfig
from swift_dist.config.load import load_job
from swift_dist.errors import JobError
from swift_dist.runs import files, folder, manifest
from swift_dist.runs.folder import RunFolder


def job(**changes) -> JobConfig:
    return JobConfig.model_validate({"model": {"config": {"hidden_size": 8}}, "train": {"steps": 5}, **changes})


HOLD = """
    import sys, time
    from swift_dist.config import JobConfig
    from swift_dist.runs.folder import RunFolder
    RunFolder(sys.argv[1]).begin(JobConfig.model_validate({"model": {"config": {"x": 1}}, "train": {"steps": 5}}))
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A live process that drives tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_for_job_makes_nothing_and_begin_makes_the_layout(tmp_path):
    run = RunFolder.for_job(job(output=str(tmp_path / "a" / "run")))
    assert list(tmp_path.iterdir()) == [] and not run.exists()
    run.begin(job(), layout={"tp": 2}, command=["swift-dist", "pretrain"])
    assert {p.name for p in run.path.iterdir() if not p.name.startswith(".")} == {
        "job.yaml",
        "manifest.json",
        "status.json",
        "logs",
        "checkpoints",
    }
    assert run.manifest()["attempts"][0]["layout"] == {"tp": 2}
    assert run.manifest()["attempts"][0]["command"] == ["swift-dist", "pretrain"]
    status = run.status()
    assert status is not None and status.state == "running" and status.driver.pid == os.getpid() and status.steps == 5


def test_a_run_hides_no_other(tmp_path):
    """In another run's folder, or around it, it would: `runs list` does not look into runs."""
    run = RunFolder(tmp_path / "runs" / "one")
    run.begin(job())
    for output, words in ((tmp_path / "runs", "holds other runs, such as one"), (run.path / "sub", "lies in the run")):
        with pytest.raises(JobError, match=words):
            RunFolder.for_job(job(output=str(output)))
    RunFolder.for_job(job(output=str(tmp_path / "runs" / "two")))


def test_job_yaml_runs_again_as_it_is(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.begin(job(optimizer={"lr": 1e-5}))
    again = load_job(run.job_path)
    assert again == job(optimizer={"lr": 1e-5}, output=str(tmp_path / "run"))


def test_default_names_are_new_and_under_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [RunFolder.for_job(job()).path for _ in range(50)]
    assert len(set(paths)) == 50
    assert all(p.parent == tmp_path / "runs" and p.name.startswith("pretrain-2") for p in paths)
    taken = RunFolder.for_job(job())
    taken.path.mkdir(parents=True)  # another job of the same microsecond
    with pytest.raises(JobError, match="cannot be written"):
        taken.begin(job())


def test_resume_never_refuses_an_existing_run(tmp_path):
    output = str(tmp_path / "run")
    RunFolder(output).begin(job())
    assert RunFolder.for_job(job(output=output)).exists()
    with pytest.raises(JobError, match=r"^output: .*already holds a run"):
        RunFolder.for_job(job(output=output, resume="never"))


def test_a_job_file_that_is_no_runs_is_not_replaced(tmp_path):
    (tmp_path / "job.yaml").write_text("train: {steps: 5}\n")
    with pytest.raises(JobError, match=r"^output: .*job\.yaml of your own"):
        RunFolder.for_job(job(output=str(tmp_path)))


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(JobError, match=r"^output: .*file is a file"):
            RunFolder.for_job(job(output=str(output)))


def test_a_second_live_driver_is_refused_and_changes_nothing(tmp_path, holder):
    run = RunFolder(tmp_path / "run")
    before = {p.name: p.read_bytes() for p in run.path.iterdir() if p.is_file()}
    with pytest.raises(JobError, match=rf"in use: process {holder.pid} on "):
        run.begin(job())
    assert {p.name: p.read_bytes() for p in run.path.iterdir() if p.is_file()} == before


def test_a_killed_driver_lets_go(tmp_path, holder):
    run = RunFolder(tmp_path / "run")
    status = run.status()
    assert status is not None and not status.is_dead
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # ended, but still a zombie: dead all the same
    assert status.is_dead
    run.begin(job())
    assert [a["state"] for a in run.manifest()["attempts"]] == ["dead", "running"]


def test_a_reused_process_id_is_not_taken_for_the_driver(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.begin(job())
    values = json.loads(run.status_path.read_text())
    values["driver"]["started"] = "1"  # this pid, but another process's start
    run.status_path.write_text(json.dumps(values))
    status = run.status()
    assert status is not None and status.is_dead


def test_a_driver_elsewhere_is_dead_after_silence(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.begin(job())
    values = json.loads(run.status_path.read_text())
    values["driver"].update(space="another machine", host="far")
    run.status_path.write_text(json.dumps(values))
    with pytest.raises(JobError, match="in use"):
        RunFolder(run.path).begin(job())
    values["updated"] = "2020-01-01T00:00:00+00:00"
    run.status_path.write_text(json.dumps(values))
    status = run.status()
    assert status is not None and status.is_dead


def test_of_drivers_that_start_together_one_wins(tmp_path):
    script = textwrap.dedent("""
        import sys
        from swift_dist.config import JobConfig
        from swift_dist.errors import JobError
        from swift_dist.runs.folder import RunFolder
        print("ready", flush=True)
        sys.stdin.readline()
        try:
            RunFolder(sys.argv[1]).begin(JobConfig())
            print("won", flush=True)
        except JobError as error:
            print(error, flush=True)
        sys.stdin.readline()  # a winner stays alive until all have tried
    """)
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    together = [subprocess.Popen(command, stdin=-1, stdout=-1, text=True, bufsize=1) for _ in range(4)]
    try:
        assert [p.stdout.readline() for p in together] == ["ready\n"] * 4
        for process in together:
            process.stdin.write("go\n")
        answers = [p.stdout.readline() for p in together]
        assert sorted("won" in a for a in answers) == [False, False, False, True], answers
        assert sum("in use" in a for a in answers) == 3
    finally:
        for process in together:
            process.communicate()


def test_end_states_are_kept_and_the_stop_file_goes(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.begin(job())
    assert not run.stop_requested()
    run.request_stop()
    assert RunFolder(run.path).stop_requested()
    run.set_places(["a", "a"], [2, 2])
    run.add_restart(reason="rank 1 died", from_step=3)
    run.end("interrupted", message="asked to stop", step=4)
    assert not run.stop_requested()
    status = run.status()
    assert status is not None and (status.state, status.step, status.message) == ("interrupted", 4, "asked to stop")
    (attempt,) = run.manifest()["attempts"]
    assert (attempt["hosts"], attempt["threads_per_rank"]) == (["a", "a"], [2, 2])
    assert attempt["state"] == "interrupted" and attempt["ended"]
    assert attempt["restarts"][0]["reason"] == "rank 1 died" and attempt["restarts"][0]["from_step"] == 3


def test_an_interrupt_while_it_begins_lets_go(tmp_path, monkeypatch):
    """Else other machines would wait for its silence before they let the next driver in."""

    def interrupted(values):
        raise KeyboardInterrupt

    run = RunFolder(tmp_path / "run")
    monkeypatch.setattr(folder, "dump_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.begin(job())
    assert run.status().state == "interrupted"


def test_a_leftover_stop_file_does_not_stop_the_next_attempt(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.begin(job())
    run.request_stop()
    run.begin(job())
    assert not run.stop_requested()


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    files.write_json(path, {"a": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_json(path, {"a": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"] and files.read_json(path) == {"a": 1}


def test_manifest_hashes_tell_data_apart(tmp_path):
    prefix = tmp_path / "data"
    Path(f"{prefix}.bin").write_bytes(b"abc")
    Path(f"{prefix}.idx").write_bytes(b"i")
    described = manifest.describe(job(data={"train": str(prefix)}))
    digest = described["data"][str(prefix)]["data.bin"]
    assert digest == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, "abc"
    assert described["versions"]["torch"] and described["model"]["config"].startswith("sha256:")
    Path(f"{prefix}.bin").write_bytes(b"abd")
    assert manifest.hash_data(job(data={"train": str(prefix)}))[str(prefix)]["data.bin"] != digest


def test_large_files_are_sampled_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "WHOLE_UP_TO", 2**20)
    path = tmp_path / "large"
    data = bytearray(40 * 2**20)
    path.write_bytes(data)
    first = manifest.hash_file(path)
    assert first.startswith("sha256-sampled:")
    data[-1] = 1
    path.write_bytes(data)
    assert manifest.hash_file(path) != first


def test_interrupting_the_holder_by_signal_reaches_it(holder, tmp_path):
    """The pid and start time in status.json are those of the process itself."""
    status = RunFolder(tmp_path / "run").status()
    assert status is not None and status.driver.is_visible and status.driver.is_alive
    os.kill(status.driver.pid, signal.SIGTERM)
    assert holder.wait(timeout=60) == -signal.SIGTERM
    assert folder.RunFolder(tmp_path / "run").status().is_dead
