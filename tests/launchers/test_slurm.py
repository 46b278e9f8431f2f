"""The Slurm launcher and the scripts without a Slurm: what is rendered, refused, and made of Slurm's answers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from swift_dist.config.job import JobConfig
from swift_dist.config.load import build
from swift_dist.errors import JobError, RunError
from swift_dist.launchers._base import Submission
from swift_dist.launchers._slurm_handle import JobState, SlurmHandle
from swift_dist.launchers.slurm import LAUNCHER, ray_cluster

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "slurm").glob("*.sh"), *(ROOT / "slurm").glob("*.sbatch")])


def job(**options: object) -> JobConfig:
    values = {
        "output": "/shared/runs/my run",
        "cluster": {"nnodes": 2, "nproc_per_node": 8},
        "launch": {"slurm": options},
    }
    return build(JobConfig, [values])


def directives(text: str) -> set[str]:
    return set(re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE))


def shellcheck(*words: str, text: str | None = None) -> None:
    program = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([str(program), *words], input=text, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_scripts_pass_shellcheck():
    assert {s.name for s in SCRIPTS} >= {
        "ray_cluster.sh", "prepare.sbatch", "pretrain.sbatch", "convert.sbatch", "attach.sh", "chain.sh"
    }  # fmt: skip
    shellcheck("-x", *(str(s.relative_to(ROOT)) for s in SCRIPTS))


def test_a_rendered_script_is_complete():
    text = LAUNCHER.render(
        job(partition="gpu,big", time="1-12", qos="high", account="a", constraint="h100|a100", mem="500G",
            exclusive=True, sbatch=["--exclude=n7"], setup=["module load cuda"], dependency="afterok:12",
            signal_seconds=300)
    )  # fmt: skip
    assert directives(text) == {
        "--job-name='swift_dist-my run'", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=8", "--gres=gpu:8",
        "--partition=gpu,big", "--account=a", "--qos=high", "--constraint='h100|a100'", "--time=1-12", "--mem=500G",
        "--dependency=afterok:12", "--signal=B:USR1@300", f"--chdir={Path.cwd()}",
        "--output='/shared/runs/my run/slurm/%j.log'", "--open-mode=append", "--requeue", "--exclusive",
        "--kill-on-invalid-dep=yes", "--exclude=n7",
    }  # fmt: skip
    assert ray_cluster() == (ROOT / "slurm/ray_cluster.sh").read_text()
    assert ray_cluster().rstrip() in text and "\nmodule load cuda\n" in text
    assert """RAY_CLUSTER_LOGS='/shared/runs/my run/slurm'/"$SLURM_JOB_ID".d""" in text
    last = text.rstrip().splitlines()[-1]
    assert last.startswith("ray_cluster_run swift-dist pretrain '--output=/shared/runs/my run' ")
    assert "--launcher local --json >" in last and "launch.slurm" not in last
    shellcheck("-", text=text)


def test_options_change_the_script():
    assert "--no-requeue" in directives(text := LAUNCHER.render(job(requeue=False)))
    assert "RAY_CLUSTER_MAX_RESTARTS=0" in text.splitlines()
    assert not any("gres" in line for line in directives(LAUNCHER.render(job(gres=""))))
    assert "--gres=gpu:a100:4" in directives(LAUNCHER.render(job(gres="gpu:a100:4")))
    text = LAUNCHER.render(job(container_image="/i.sif", container_runtime="apptainer", container_mounts=["/data"]))
    assert "export PATH" not in text and "RAY_CLUSTER_RUNTIME=apptainer" in text
    assert "RAY_CLUSTER_MOUNTS='/shared/runs/my run,/data'" in text


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("launch.slurm.cpus_per_task", {"cpus_per_task": 7}),
        ("launch.slurm.sbatch", {"sbatch": ["--array=1-3"]}),
        ("launch.slurm.sbatch", {"sbatch": ["-N 3"]}),
        ("launch.slurm.sbatch", {"sbatch": ["exclude"]}),
        ("launch.slurm.partition", {"partition": "a\nrm -rf /"}),
        ("launch.slurm.time", {"time": 86400}),  # YAML's reading of 24:00:00, which Slurm would take as minutes
        ("launch.slurm.ports", {"ports": "many"}),
        ("launch.slurm.ports", {"ports": "24000-24030"}),
        ("launch.slurm.ports", {"ports": "31999-24000"}),
        ("launch.slurm.ports", {"ports": "65000-70000"}),
    ],
)
def test_wrong_options_are_refused(key, options):
    with pytest.raises(JobError) as caught:
        LAUNCHER.render(job(**options))
    assert caught.value.key.startswith(key)


def bash(code: str, folder: Path, **env: str) -> str:
    """Bash that has sourced ray_cluster.sh as in a job."""
    variables = {**os.environ, "SLURM_JOB_ID": "1001", "RAY_CLUSTER_LOGS": str(folder / "logs"), **env}
    done = subprocess.run(
        ["bash", "-c", f"source {ROOT}/slurm/ray_cluster.sh\n{code}"],
        env=variables, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_jobs_near_each_other_have_other_ports(tmp_path):
    code = "for id in $(seq 1000 1249); do SLURM_JOB_ID=$id; _rc_ports; echo $_RC_BASE; done"
    bases = [int(line) for line in bash(code, tmp_path).split()]
    assert len(set(bases)) == 250 and all(base >= 24000 and base + 31 <= 31999 for base in bases)


@pytest.mark.parametrize("band", ["24000-24030", "31999-24000", "65000-70000", "24000"])
def test_a_band_that_is_none_is_named(band, tmp_path):
    code = "_rc_ports 2>&1; echo $?"
    *said, code = bash(code, tmp_path, RAY_CLUSTER_PORTS=band).splitlines()
    assert code == "2" and "RAY_CLUSTER_PORTS" in said[0] and band in said[0]
    assert bash("_rc_ports; echo $_RC_BASE", tmp_path, RAY_CLUSTER_PORTS="24000-24031") == "24000\n"


def stand_in(folder: Path, name: str, code: str) -> dict[str, str]:
    """A PATH on which a program of that name is this bash code."""
    file = folder / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/bin/bash\n{code}\n")
    file.chmod(0o755)
    return {"PATH": f"{file.parent}:{os.environ['PATH']}"}


SCONTROL = """
if [ "$2" = hostnames ]; then printf "n1\\nn2\\n"
else
    echo "NodeName=n1 Arch=x NodeAddr=localhost NodeHostName=n1"
    echo "NodeName=n2 Arch=x NodeAddr=10.0.0.2 Port=1"
fi
"""


@pytest.mark.parametrize(("interface", "head"), [("", "10.9.9.9"), ("ib0", "10.8.0.1")])
def test_nodes_are_found_under_addresses_that_the_others_reach(tmp_path, interface, head):
    """n1 is this machine and knows itself as 127.0.0.1: its own address, or its interface's, is told to n2."""
    env = {"SLURMD_NODENAME": "n1", "SLURM_JOB_NODELIST": "n[1-2]", "RAY_CLUSTER_INTERFACE": interface}
    env |= stand_in(tmp_path, "scontrol", SCONTROL)
    env |= stand_in(tmp_path, "hostname", "echo 10.9.9.9 172.17.0.1")
    env |= stand_in(
        tmp_path, "ip", f"echo '3: {interface}    inet 10.8.0.1/24 brd 10.8.0.255 scope global {interface}'"
    )
    out = bash("_rc_ports; _rc_find_nodes; echo $RAY_ADDRESS, $_RC_ADDRESSES", tmp_path, **env)
    assert out == f"{head}:{24000 + 1001 % 250 * 32}, 10.9.9.9 10.0.0.2\n"


def test_ray_gets_the_cpus_of_the_job_and_a_token_of_its_own(tmp_path):
    code = "RAY_ADDRESS=h:1; _rc_export; echo $_RC_CPUS $RAY_CLUSTER_GPUS; env | grep RAY_AUTH | sort; cat $logs/token"
    code = code.replace("$logs", "$RAY_CLUSTER_LOGS")
    env = {"SLURM_JOB_CPUS_PER_NODE": "16(x2),12", "SLURM_GPUS_ON_NODE": "4", "RAY_AUTH_TOKEN": "the submitter's"}
    first, mode, path, token = bash(code, tmp_path, **env).split("\n")
    assert first == "12 4" and mode == "RAY_AUTH_MODE=token" and path == f"RAY_AUTH_TOKEN_PATH={tmp_path}/logs/token"
    assert re.fullmatch("[0-9a-f]{64}", token) and bash(code, tmp_path, **env).split("\n")[3] != token
    for name in ("token", "environment"):
        assert (tmp_path / "logs" / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_steps_run_in_the_container(tmp_path, runtime):
    """Through programs that stand in for srun and apptainer: neither container runtime can be installed here."""
    code = 'echo "$0 $*" | head -1 >&2; while [ "$1" != bash ]; do shift; done; "$@"'
    path = stand_in(tmp_path, "srun", code) | stand_in(tmp_path, "apptainer", code)
    code = "_RC_CPUS=2; hello() { echo hello \"$1\"; }; _rc_step --nodes=1 -- hello 'my world' 2>&1"
    env = {
        **path,
        "RAY_CLUSTER_IMAGE": "/i.img",
        "RAY_CLUSTER_RUNTIME": runtime,
        "RAY_CLUSTER_MOUNTS": "/data:/d,/models",
        "RAY_CLUSTER_GPUS": "2",
    }
    out = bash(code, tmp_path, **env)
    assert "hello my world" in out
    logs = tmp_path / "logs"
    if runtime == "apptainer":
        assert f"apptainer exec --bind {logs},/data:/d,/models --nv /i.img bash -c" in out
    else:
        assert "--container-image=/i.img" in out
        assert f"--container-mounts={logs}:{logs},/data:/d,/models:/models,{Path.cwd()}:{Path.cwd()}" in out


def test_outside_of_a_job_the_script_says_so():
    done = subprocess.run(
        ["env", "-u", "SLURM_JOB_ID", "bash", "-c", f"source {ROOT}/slurm/ray_cluster.sh; echo went on"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "belongs into a batch script" in done.stderr and "went on" not in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "stream"), [(["--help"], 0, "stdout"), ([], 2, "stderr"), (["hf-to-megatron", "a"], 2, "stderr")]
)
def test_the_conversion_s_script_says_how_to_use_it(words, code, stream):
    done = subprocess.run(
        ["env", "-u", "SLURM_JOB_ID", "bash", str(ROOT / "slurm/convert.sbatch"), *words],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code and "sbatch convert.sbatch hf-to-megatron " in getattr(done, stream)


@pytest.mark.parametrize(
    ("word", "code", "state"),
    [
        ("PENDING", 0, "waiting"),
        ("REQUEUED", 0, "waiting"),
        ("RUNNING", 0, "running"),
        ("COMPLETING", 0, "running"),
        ("COMPLETED", 0, "done"),
        ("CANCELLED", 0, "interrupted"),
        ("FAILED", 130, "interrupted"),
        ("FAILED", 9, "failed"),
        ("TIMEOUT", 0, "failed"),
        ("NODE_FAIL", 0, "failed"),
        ("OUT_OF_MEMORY", 0, "failed"),
    ],
)
def test_states(word, code, state):
    assert JobState(word, code).state == state


@pytest.fixture
def ended(tmp_path, monkeypatch):
    """The handle of a job that ended: what Slurm says, and the result that its driver left."""

    def make(word: str, codes: str, result: object = None, more: str = "") -> SlurmHandle:
        scontrol = tmp_path / "bin/scontrol"
        scontrol.parent.mkdir()
        answer = f"JobId=7 JobState={word} Reason=None ExitCode={codes} {more}"
        scontrol.write_text(f"#!/bin/sh\necho '{answer}'\n" if word else "#!/bin/sh\necho Invalid job id >&2; exit 1\n")
        scontrol.chmod(0o755)
        (tmp_path / "bin/sacct").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "bin/sacct").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
        (tmp_path / "7.log").write_text("one\ntwo")
        (tmp_path / "7.d").mkdir()
        if result is not None:
            (tmp_path / "7.d/result.json").write_text(json.dumps(result))
        return SlurmHandle(Submission("slurm", "7", str(tmp_path / "7.log")), tmp_path)

    return make


@pytest.mark.parametrize(
    ("requeue", "seconds", "state"), [(1, 5, "waiting"), (1, 600, "failed"), (0, 5, "failed"), (1, None, "waiting")]
)
def test_a_lost_node_s_job_is_not_ended_while_it_goes_back_into_the_queue(ended, requeue, seconds, state):
    end = "Unknown" if seconds is None else f"{datetime.now() - timedelta(seconds=seconds):%Y-%m-%dT%H:%M:%S}"
    assert ended("NODE_FAIL", "0:0", more=f"Requeue={requeue} EndTime={end}").status() == state


def refused(code: int, kind: str, **fields: str) -> dict[str, object]:
    return {"error": {"kind": kind, **fields}, "exit_code": code}


def test_the_result_is_the_driver_s(ended, capsys):
    result = {"state": "done", "step": 3, "loss": 1.5}
    assert ended("COMPLETED", "0:0", result).wait() == result
    assert capsys.readouterr().err == "one\ntwo\n"


def test_a_wrong_job_is_told_as_here(ended):
    error = JobError("train.steps", "it is 0", "--train.steps 1")
    handle = ended("FAILED", "2:0", refused(2, "job", message=str(error), key=error.key, remedy=error.remedy))
    with pytest.raises(JobError) as caught:
        handle.wait()
    assert str(caught.value) == str(error)


def test_a_failed_run_is_told_as_here(ended):
    error = RunError("rank 1 is gone", "look")
    with pytest.raises(RunError) as caught:
        ended("FAILED", "1:0", refused(1, "run", message=str(error), remedy="look")).wait()
    assert str(caught.value) == str(error)


@pytest.mark.parametrize(
    ("word", "codes", "says"),
    [
        ("FAILED", "9:0", "ended as FAILED 9:0"),
        ("FAILED", "72:0", "not all nodes joined"),
        ("TIMEOUT", "0:15", "time limit"),
    ],
)
def test_an_end_without_a_result_is_explained(ended, monkeypatch, word, codes, says):
    monkeypatch.setattr("swift_dist.launchers._slurm_handle._RESULT_SECONDS", 0.0)
    with pytest.raises(RunError, match=says):
        ended(word, codes).wait()


def test_a_cancelled_job_was_interrupted(ended):
    with pytest.raises(KeyboardInterrupt, match="was cancelled"):
        ended("CANCELLED", "0:15").wait()


@pytest.mark.parametrize(("result", "state"), [("done", "done"), ("stopped", "done"), ("interrupted", "interrupted")])
def test_a_job_that_slurm_forgot_is_known_by_its_result(ended, result, state):
    handle = ended("", "", {"state": result, "step": 3})
    assert handle.status() == state and handle.wait()["step"] == 3


def test_a_job_that_nobody_knows(ended):
    with pytest.raises(RunError, match="knows no job 7"):
        ended("", "").status()


def test_without_slurm_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    values = job().model_copy(update={"output": str(tmp_path / "run")})
    with pytest.raises(JobError, match="no sbatch on this machine"):
        LAUNCHER.submit(values)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["sft", "rlhf"])
def test_what_the_script_of_long_sequences_adds(tmp_path: Path, verb: str) -> None:
    """To the words of sft.sbatch, which is sourced from its folder. Pairs cannot be packed."""
    script = tmp_path / "sft_long_context.sbatch"
    script.write_text((ROOT / "slurm/sft_long_context.sbatch").read_text())
    (tmp_path / "sft.sbatch").write_text('echo "$@"\n')
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho JobId=1 Command={script}\n")
    (tmp_path / "scontrol").chmod(0o755)
    site = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "SFT_VERB": verb}
    variables = {**os.environ, **site, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    told = subprocess.run(
        ["bash", str(script), "runs/x", "--train.recompute=none"], env=variables, capture_output=True, text=True
    )
    added = "--sequence_parallel_size 16 --fsdp fsdp2" + (" --packing true" if verb == "sft" else "")
    assert told.stdout.split() == f"runs/x --train.recompute=none {added}".split(), told.stderr
