"""`--launcher ray` without a cluster: what is sent, what would be run, what is refused, and how a job's end is read."""

from __future__ import annotations

import json
import os
import shlex
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swift_dist.cluster.versions import VARIABLE, check_versions, expected
from swift_dist.config import JobConfig
from swift_dist.config.load import load_job
from swift_dist.errors import JobError, RunError
from swift_dist.launchers import _ray_handle
from swift_dist.launchers._base import Submission, Work
from swift_dist.launchers._ray_client import Unreachable, resolve_address
from swift_dist.launchers._ray_handle import RayHandle, state_of
from swift_dist.launchers._ray_room import require_room
from swift_dist.launchers._upload import collect, pack
from swift_dist.launchers.ray import LAUNCHER, Options
from swift_dist.runs.folder import RunFolder

ADDRESS = "http://head:8265"


def files(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def collected(folder: Path, **options: Any) -> Any:
    return collect(folder, **{"excludes": (), "max_file_size": 1, "max_size": 10, **options})


# --- what is sent


def test_code_goes_along_and_what_is_no_code_stays_here(tmp_path):
    work = tmp_path / "work"
    files(work, "job.yaml", "pkg/__init__.py", "pkg/__pycache__/x.pyc", "pkg/.mypy_cache/x", "stale.pyc")
    files(work, ".git/HEAD", "sub/.git", "env/pyvenv.cfg", "env/bin/python", "conda/conda-meta/history")
    files(work, "runs/a/status.json", "runs/a/job.yaml", "runs/b/submission.json", "runs/notes.txt")
    files(tmp_path, "rooms/extra/__init__.py", "one.py")
    (work / "rooms").symlink_to(tmp_path / "rooms")
    (work / "linked.py").symlink_to("../one.py")
    (work / "gone.py").symlink_to("nowhere")
    (work / "pkg" / "around").symlink_to("..")
    os.mkfifo(work / "pipe")
    with (work / "weights.bin").open("wb") as file:
        file.truncate(3 * 2**20)

    found = collected(work)
    assert sorted(found.files) == [
        *("job.yaml", "linked.py", "pkg/__init__.py", "rooms/extra/__init__.py", "runs/notes.txt"),
    ]
    assert found.left_out == {
        ".git/": "repository",
        "sub/.git": "repository",
        "env/": "Python environment",
        "conda/": "Python environment",
        "runs/a/": "run folder",
        "runs/b/": "run folder",
        "gone.py": "no such file or directory",
        "pkg/around/": "a link to a folder that it lies in",
        "pipe": "no readable file",
        "weights.bin": "3 MiB",
    }
    assert "weights.bin (3 MiB)" in found.warning()
    assert collected(tmp_path / "rooms").warning() is None


def test_patterns_leave_out_as_in_a_gitignore(tmp_path):
    files(tmp_path, "a.log", "keep.log", "deep/b.log", "deep/data/x", "data/x", "tmp/x", "deep/tmp/x", "secret")
    (tmp_path / ".gitignore").write_text("*.log\n!keep.log\n/data/\n")
    (tmp_path / "deep" / ".rayignore").write_text("tmp\n")
    found = collected(tmp_path, excludes=("secret",))
    assert sorted(found.files) == [".gitignore", "deep/.rayignore", "deep/data/x", "keep.log", "tmp/x"]
    assert found.left_out == {}


def test_the_archive_depends_on_the_contents_alone(tmp_path):
    files(tmp_path / "work", "b.py", "a/c.py")
    (tmp_path / "work" / "b.py").chmod(0o755)
    pack(collected(tmp_path / "work"), tmp_path / "one.zip")
    os.utime(tmp_path / "work" / "b.py", (1, 1))
    pack(collected(tmp_path / "work"), tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    (tmp_path / "work" / "b.py").write_text("other")
    pack(collected(tmp_path / "work"), tmp_path / "three.zip")
    assert (tmp_path / "one.zip").read_bytes() != (tmp_path / "three.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert {n: archive.read(n).decode() for n in archive.namelist()} == {"b.py": "b.py", "a/c.py": "a/c.py"}
        assert archive.getinfo("b.py").external_attr >> 16 & 0o777 == 0o755


def test_too_much_is_refused_and_the_largest_named(tmp_path):
    for number in range(4):
        files(tmp_path, f"big/{number}")
        with (tmp_path / f"big/{number}").open("wb") as file:
            file.truncate(2**20)
    with pytest.raises(JobError, match=r"more than 3 MiB.*big \(4 MiB\)") as caught:
        collected(tmp_path, max_size=3)
    assert caught.value.key == "launch.ray.max_upload_size" and "excludes" in caught.value.remedy
    with pytest.raises(JobError, match="not a folder"):
        collected(tmp_path / "nowhere")


# --- what would be run


def a_job(**ray: Any) -> JobConfig:
    return JobConfig.model_validate(
        {
            "output": "/shared/run",
            "model": {"config": {"model_type": "llama", "rms_norm_eps": 1e-6}},
            "data": {"train": ["/shared/it's here"]},
            "cluster": {"nnodes": 2, "nproc_per_node": 4, "env": {"A": "x y"}},
            "launch": {"ray": {"address": ADDRESS, **ray}, "torchrun": {"node_rank": 1}},
        }
    )


def test_the_artefact_is_a_command_that_makes_the_same_job(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "very-secret")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    files(tmp_path, "env/pyvenv.cfg", "code.py")
    job = a_job(
        working_dir=str(tmp_path),
        excludes=["*.txt"],
        pass_env=["NCCL_*"],
        runtime_env={"pip": ["x"], "env_vars": {"B": "1"}},
        entrypoint_num_cpus=2,
        entrypoint_resources={"head": 0.5},
        metadata={"team": "a"},
        stop_timeout=77,
    )
    words = shlex.split(LAUNCHER.render(job))
    ours, theirs = words[: words.index("--")], words[words.index("--") + 1 :]
    assert theirs[:3] == ["exec", "swift-dist", "pretrain"] and theirs[-2:] == ["--launcher", "local"]
    plain = job.model_copy(update={"launch": type(job.launch)()})
    assert load_job(None, theirs[3:-2], "pretrain") == plain
    assert ours[:5] == ["ray", "job", "submit", "--address", ADDRESS]
    options = dict(zip(ours[6::2], ours[7::2], strict=True))
    env = json.loads(options["--runtime-env-json"])
    assert env["excludes"] == ["*.txt", "/env/"] and env["pip"] == ["x"]
    assert env["env_vars"] == {
        "B": "1", "NCCL_DEBUG": "INFO", "RAY_JOB_STOP_WAIT_TIME_S": "77", VARIABLE: expected()
    }  # fmt: skip
    assert options["--entrypoint-num-cpus"] == "2" and json.loads(options["--entrypoint-resources"]) == {"head": 0.5}
    metadata = json.loads(options["--metadata-json"])
    assert metadata["team"] == "a" and metadata["output"] == "/shared/run"
    assert "very-secret" not in LAUNCHER.render(job)


def test_nothing_is_sent_and_nothing_compared_where_that_is_asked_for(tmp_path):
    text = LAUNCHER.render(a_job(upload=False, check_versions=False))
    assert "--working-dir" not in text and VARIABLE not in text
    with pytest.raises(JobError, match="working_dir is sent by upload"):
        LAUNCHER.render(a_job(upload=False, runtime_env={"working_dir": "/x"}))


@pytest.mark.parametrize(
    ("asked", "variables", "expected_address"),
    [
        ("http://a:1/", {"RAY_ADDRESS": "http://b:1"}, "http://a:1"),
        (None, {"RAY_ADDRESS": "http://b:1"}, "http://b:1"),
        (None, {"RAY_ADDRESS": "b:6379", "RAY_API_SERVER_ADDRESS": "https://c"}, "https://c"),
        (None, {"RAY_ADDRESS": "b:6379"}, None),
        (None, {}, None),
        ("ray://x:10001", {}, None),
    ],
)
def test_the_dashboards_address(monkeypatch, asked, variables, expected_address):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if expected_address:
        assert resolve_address(asked) == expected_address
    else:
        with pytest.raises(JobError) as caught:
            resolve_address(asked)
        assert caught.value.key == "launch.ray.address" and "8265" in caught.value.remedy


# --- what is refused


def test_what_can_never_be_placed_is_refused():
    small, large = {"CPU": 4.0, "memory": 1e9}, {"CPU": 8.0, "GPU": 8.0, "memory": 1e9, "head": 1.0}
    require_room(Work.of(a_job()), [small, small])
    require_room(Work.of(a_job(entrypoint_num_cpus=1)), [small, small, small])
    require_room(Work.of(a_job(entrypoint_num_cpus=4, entrypoint_resources={"head": 1})), [small, large])
    for nodes, options, key, text in [
        ([small], {}, "cluster.nnodes", "has 1 such node"),
        ([small, small], {"entrypoint_num_cpus": 1}, "launch.ray.entrypoint_num_cpus", "no room for 2 nodes"),
        ([small, small], {"entrypoint_num_cpus": 5}, "launch.ray.entrypoint_num_cpus", "no node of the cluster has 5"),
        ([small, large], {"entrypoint_num_cpus": 5, "entrypoint_resources": {"head": 1}},
         "launch.ray.entrypoint_num_cpus", "no room"),
        ([small, large], {"entrypoint_resources": {"tail": 1}}, "launch.ray.entrypoint_resources", "1 tail"),
        ([small, small], {"entrypoint_memory": 2 * 10**9}, "launch.ray.entrypoint_memory", "memory"),
    ]:  # fmt: skip
        with pytest.raises(JobError, match=text) as caught:
            require_room(Work.of(a_job(**options)), nodes)
        assert caught.value.key == key


def test_other_versions_than_the_submitters_are_named(monkeypatch):
    check_versions({})
    check_versions({VARIABLE: expected()})
    wanted = {**json.loads(expected()), "torch": "1.0"}
    with pytest.raises(JobError, match=r"torch \S+ \(submitter: 1\.0\)\n") as caught:
        check_versions({VARIABLE: json.dumps(wanted)})
    assert caught.value.key == "launch.ray.check_versions"


def test_a_rank_compares_its_own_node(monkeypatch, tmp_path):
    from swift_dist.cluster.worker import RankProcess, Setup
    from swift_dist.config.job import ClusterSection

    rank = object.__new__(RankProcess)  # without the process of an actor around it
    rank._setup = Setup("json:dumps", {}, str(tmp_path), ClusterSection(), "127.0.0.1", 1, False, 0)
    rank._assignment = None
    assert rank.warm(None) is None
    monkeypatch.setenv(VARIABLE, json.dumps({**json.loads(expected()), "megatron-core": "0.1"}))
    failure = rank.warm(None)
    assert (failure.kind, failure.key) == ("job", "launch.ray.check_versions")
    assert "(submitter: 0.1)" in failure.message


def test_a_build_for_other_devices_is_the_same_version(monkeypatch):
    from swift_dist.cluster import versions

    here = versions.versions()
    monkeypatch.setattr(versions, "versions", lambda: {**here, "torch": "2.13.0+cpu"})
    from_a_laptop = expected()
    monkeypatch.setattr(versions, "versions", lambda: {**here, "torch": "2.13.0+cu130"})
    check_versions({VARIABLE: from_a_laptop})


# --- how it ends


class Server:
    """A job server of one job. `script`: what each connection gives before it breaks (or ends, after the last)."""

    def __init__(self, text: str, status: str, code: int | None = None, message: str = "", script=()) -> None:
        self.full, self.end, self.script = text, (status, code, message), list(script)
        self.connections = self.stopped = 0

    def __call__(self, address: str) -> Server:
        return self

    def info(self, job: str) -> Any:
        status, code, message = ("RUNNING", None, "") if self.script else self.end
        return SimpleNamespace(
            status=status, driver_exit_code=code, message=message, start_time=1000, end_time=3500, metadata={}
        )

    def text(self, job: str) -> str:
        return self.full

    def stop(self, job: str) -> None:
        self.stopped += 1

    def tail(self, job: str):
        self.connections += 1
        shown = self.script.pop(0) if self.script else len(self.full)
        for start in range(0, shown, 5):
            yield self.full[start : min(start + 5, shown)]
        if self.script:
            raise Unreachable("cut")


@pytest.fixture
def follow(monkeypatch, tmp_path):
    """A handle of a job on a `Server`."""

    def handle(server: Server, **options: Any) -> RayHandle:
        monkeypatch.setattr(_ray_handle, "RayJobs", server)
        monkeypatch.setattr(_ray_handle, "_RETRY_SECONDS", 0.0)
        return RayHandle(Submission("ray", "job-1", ADDRESS), tmp_path / "run", **options)

    return handle


def test_every_line_comes_once_however_often_the_connection_breaks(follow, capfd):
    text = "".join(f"line {i}\n" for i in range(20)) + "half a line"
    server = Server(text, "SUCCEEDED", 0, script=[0, 12, 3, 12, 100, 60, len(text)])
    assert list(follow(server).logs(follow=True)) == text.split("\n")
    assert server.connections >= 7
    assert list(follow(Server(text, "SUCCEEDED", 0)).logs()) == text.split("\n")


def test_a_cluster_that_stays_away_is_given_up(follow):
    class Gone(Server):
        def tail(self, job):
            raise Unreachable("no Ray dashboard answers at http://head:8265: refused")

    with pytest.raises(RunError, match="for 0 s") as caught:
        list(follow(Gone("x\n", "RUNNING"), reconnect_timeout=0.0).logs(follow=True))
    assert "runs logs" in caught.value.remedy


def test_a_result_of_the_run_folder(follow, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin(JobConfig())
    folder.update(step=7, loss=1.5)
    folder.end("done", step=7)
    result = follow(Server("", "SUCCEEDED", 0)).wait()
    assert (result["state"], result["step"], result["loss"], result["restarts"]) == ("done", 7, 1.5, 0)
    late = follow(Server("", "SUCCEEDED", 0), attempts=1).wait()  # that attempt was there before this job
    assert (late["state"], late["step"], late["seconds"]) == ("done", None, 2.5)


@pytest.mark.parametrize(
    ("server", "error", "words", "remedy"),
    [
        (Server("a\nswift-dist: train.steps: too few\n  remedy: take more\n", "FAILED", 2),
         JobError, "train.steps: too few\n  remedy: take more", "take more"),
        (Server("a\nswift-dist: rank 1 died\n  remedy: try\n", "FAILED", 1), RunError, "rank 1 died", "try"),
        (Server("a\nboom\n", "FAILED", 7), RunError, "exit code 7; the last it printed:\na\nboom", ""),
        (Server("a\n", "FAILED", -9), RunError, "killed (signal 9)", "newest checkpoint"),
        (Server("a\n", "FAILED", 137), RunError, "killed (signal 9)", "newest checkpoint"),
        (Server("sh: swift-dist: not found\n", "FAILED", 127), RunError, "no command swift-dist", "environment"),
        (Server("", "FAILED", None, "runtime_env setup failed: no pip"), RunError, "could not run the job", ""),
        (Server("swift-dist: interrupted\n", "STOPPED"), KeyboardInterrupt, "before anything could be saved", ""),
        (Server("swift-dist: interrupted\n", "FAILED", 130), KeyboardInterrupt, "before anything could be saved", ""),
    ],
)  # fmt: skip
def test_how_a_job_failed(follow, server, error, words, remedy, capfd):
    with pytest.raises(error) as caught:
        follow(server).wait()
    assert words in str(caught.value)
    assert remedy in getattr(caught.value, "remedy", "")
    assert "\nswift-dist: " not in "\n" + capfd.readouterr().err  # it is said once, by whoever catches the error


def test_what_was_interrupted_with_a_checkpoint_has_a_result(follow, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin(JobConfig())
    (folder.checkpoints / "latest").write_text("step_3")
    folder.end("interrupted", step=3)
    result = follow(Server("", "STOPPED")).wait()
    assert (result["state"], result["checkpoint"]) == ("interrupted", 3)


def test_leaving_a_job_says_how_to_come_back(follow, tmp_path):
    class Interrupted(Server):
        def tail(self, job):
            yield "a line\n"
            raise KeyboardInterrupt

    server = Interrupted("", "RUNNING")
    with pytest.raises(KeyboardInterrupt, match=f"runs logs {tmp_path}/run --follow\n.*runs stop {tmp_path}/run"):
        follow(server).wait()
    with pytest.raises(KeyboardInterrupt, match=f"deploy --stop --output {tmp_path}/run"):
        follow(server, is_service=True).wait()
    assert server.stopped == 0
    waiting = follow(Server("", "PENDING"), follow=False).wait()
    assert waiting["state"] == "waiting" and waiting["submission"]["id"] == "job-1"


@pytest.mark.parametrize(
    ("status", "code", "state"),
    [
        ("PENDING", None, "waiting"),
        ("RUNNING", None, "running"),
        ("SUCCEEDED", 0, "done"),
        ("STOPPED", None, "interrupted"),
        ("FAILED", 130, "interrupted"),
        ("FAILED", 1, "failed"),
        ("FAILED", None, "failed"),
    ],
)
def test_states(status, code, state):
    assert state_of(SimpleNamespace(status=status, driver_exit_code=code)) == state


def test_the_defaults_send_no_variable_of_this_terminal():
    assert Options().pass_env == () and Options().upload and Options().check_versions
