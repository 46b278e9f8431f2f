"""What slurm/ray_cluster.sh decides when something ends: with programs that stand in for Slurm's, and no Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "slurm/ray_cluster.sh"
PROGRAMS = {
    # a step: notes its process under its name, so that scancel finds it
    "srun": """
name=probe
while [ "$1" != bash ] && [ "$1" != true ]; do
    case $1 in --job-name=*) name=${1#*=} ;; esac
    shift
done
[ $name = probe ] && exit "${PROBE:-0}"
export SLURM_NODEID=0
echo $$ >"$BED/$name"
exec "$@"
""",
    "squeue": 'for f in "$BED"/rc-*; do echo "$f ${f##*/}"; done',
    "scancel": 'kill -TERM "$(cat "${@: -1}")"',
    "scontrol": """
case "$*" in
    *requeue*) echo requeued >>"$BED/log"; kill -KILL "$PPID" ;;
    *hostnames*) echo n1 ;;
    *"show node"*) echo "NodeName=n1 x NodeAddr=127.0.0.1" ;;
    *) echo "JobId=7 JobState=${STATE:-RUNNING} PreemptTime=${PREEMPTED:-None}" ;;
esac
""",
    "python3": 'touch "$BED/joined"',
    "ray": 'exec sleep "${RAY_SECONDS:-60}"',
}


@pytest.fixture
def run(tmp_path):
    """Start a batch script with that driver; the process."""
    (tmp_path / "bin").mkdir()
    for name, code in PROGRAMS.items():
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/bash\n{code}\n")
        file.chmod(0o755)

    def begin(driver: str, **more: str) -> subprocess.Popen[str]:
        env = {
            **os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "BED": str(tmp_path), "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1", "SLURMD_NODENAME": "n1",
            "RAY_CLUSTER_LOGS": f"{tmp_path}/logs", "RAY_CLUSTER_TEMP": str(tmp_path), **more,
        }  # fmt: skip
        code = f"source {SCRIPT}\nray_cluster_run bash -c '{driver}'"
        return subprocess.Popen(["bash", "-c", code], env=env, stderr=subprocess.PIPE, text=True)

    return begin


WAITS = 'trap "exit 130" TERM; touch $BED/started; while :; do sleep 0.1; done'


def end_of(process: subprocess.Popen[str], folder: Path, number: int | None = None) -> tuple[int, str]:
    """Exit code and messages, after a signal to the batch script once the driver runs."""
    if number is not None:
        deadline = time.monotonic() + 100
        while not (folder / "started").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(number)
    _, said = process.communicate(timeout=150)
    assert not (folder / "logs/token").exists()
    return process.returncode, said


def requeued(folder: Path) -> bool:
    return (folder / "log").exists()


@pytest.mark.parametrize("code", [0, 1, 2, 9])
def test_the_exit_code_is_the_driver_s(run, tmp_path, code):
    assert end_of(run(f"exit {code}"), tmp_path)[0] == code
    assert (tmp_path / "joined").exists() and not requeued(tmp_path)


@pytest.mark.parametrize(("number", "again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_signals(run, tmp_path, number, again):
    code, said = end_of(run(WAITS), tmp_path, number)
    assert code == (-signal.SIGKILL if again else 130) and requeued(tmp_path) == again
    assert "asking the driver to checkpoint and end" in said


def test_preempted_without_a_signal_of_ours(run, tmp_path):
    end_of(run("exit 130", PREEMPTED="2026-11-21T05:37:24"), tmp_path)
    assert requeued(tmp_path)


def test_stopped_by_the_run_folder(run, tmp_path):
    assert end_of(run("exit 130"), tmp_path)[0] == 130 and not requeued(tmp_path)


def test_a_lost_node_is_told_from_a_failed_run(run, tmp_path):
    end_of(run("exit 1", PROBE="1"), tmp_path)
    assert requeued(tmp_path)


def test_a_job_that_slurm_takes_away_itself_is_left_to_it(run, tmp_path):
    """scontrol requeue from outside, or a lost node that Slurm saw first: its steps end, and it is pending again."""
    code, said = end_of(run("exit 1", PROBE="1", STATE="PENDING"), tmp_path)
    assert code == 1 and not requeued(tmp_path) and "lost" not in said


def test_ray_that_ends_on_a_healthy_node(run, tmp_path):
    code, said = end_of(run("sleep 60", RAY_SECONDS="1"), tmp_path)
    assert code == 73 and "Ray ended on a node" in said and not requeued(tmp_path)


SLOW = 'echo try >>"$BED/tries"; [ $(wc -l <"$BED/tries") = 3 ] || exit 1; echo Ray runtime started; exec sleep 60'
DEAD = 'echo try >>"$BED/tries"; echo Ray runtime started; exit 1'


@pytest.mark.parametrize(
    ("ray", "seconds", "code", "tries"), [(SLOW, "180", 130, 3), (SLOW, "0", 73, 1), (DEAD, "180", 73, 1)]
)
def test_ray_that_does_not_come_up_at_once_is_started_again(run, tmp_path, ray, seconds, code, tries):
    """Until the deadline for joining; not one that had been up."""
    (tmp_path / "bin/ray").write_text(f"#!/bin/bash\n{ray}\n")
    driver = "touch $BED/started; sleep 30" if code == 73 else WAITS
    process = run(driver, RAY_CLUSTER_JOIN_SECONDS=seconds)
    deadline = time.monotonic() + 100
    while not (tmp_path / "tries").exists() or (tmp_path / "tries").read_text().count("try") < tries:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert end_of(process, tmp_path, signal.SIGTERM if code == 130 else None)[0] == code
    assert (tmp_path / "tries").read_text().count("try") == tries


def test_the_limit_of_restarts(run, tmp_path):
    limit = {"RAY_CLUSTER_MAX_RESTARTS": "1"}
    code, said = end_of(run(WAITS, SLURM_RESTART_COUNT="1", **limit), tmp_path, signal.SIGUSR1)
    assert code == 130 and "no requeue after 1 restarts" in said and not requeued(tmp_path)
    assert end_of(run("exit 0", SLURM_RESTART_COUNT="2", **limit), tmp_path)[0] == 75
