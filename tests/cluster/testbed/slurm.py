"""A real Slurm on this machine: munged, slurmctld and three slurmd, all in one temporary folder, ended with it.

Needs root and Debian's packages (`make test-cluster` installs them). By hand, to look around:

    python tests/cluster/testbed/slurm.py        # prints SLURM_CONF, runs until Ctrl-C
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType

from swift_dist.lifetime import descendants

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
FIRST_PORT = 17000
"""slurmctld; the slurmd of node i takes this plus i. Jobs get `JOB_PORTS`."""
JOB_PORTS = "17100-17899"
NODES = ("n1", "n2", "n3")
CPUS = 4
"""Per node: more than this machine may have, which `config_overrides` allows."""

CONF = """\
ClusterName=testbed
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
SlurmctldPort={port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=15
SlurmdTimeout=10
SlurmctldTimeout=30
MinJobAge=600
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} CPUs={cpus} RealMemory=8000 Gres=gpu:2
PartitionName=low Nodes={nodes} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=high Nodes={nodes} PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""
MARK = "SWIFT_DIST_TESTBED"
"""Variable in the environment of clients, and so of jobs, but not of the daemons."""
_PR_SET_PDEATHSIG = 1
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


def what_is_missing() -> str | None:
    """Why the test bed cannot run here; None: it can."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    absent = [name for name in PROGRAMS if not _program(name)]
    return f"not installed: {', '.join(absent)} (make test-cluster installs them)" if absent else None


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin")


class Slurm:
    """The running cluster. A context manager.

    Attributes:
        root: its folder.
        variables: what a client's environment needs.
    """

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="slurm-testbed-"))
        self.variables = {"SLURM_CONF": str(self.root / "slurm.conf"), MARK: str(self.root)}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Slurm:
        try:
            self._configure()
            self._start("munged", *self._munge_words())
            self._until(lambda: (self.root / "munge/socket").exists(), "munged")
            self._start("slurmctld", "slurmctld", "-D", "-f", self.variables["SLURM_CONF"])
            for node in NODES:
                self.start_node(node)
            self.until_idle()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel all jobs, end the daemons, remove the folder."""
        if "slurmctld" in self._daemons:
            with contextlib.suppress(AssertionError, subprocess.SubprocessError):
                self.clear()
        for process in reversed(self._daemons.values()):
            process.terminate()
        for process in self._daemons.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-f", self.variables["SLURM_CONF"], "-N", node)

    def lose_node(self, node: str) -> None:
        """As if its power were cut: its slurmd and everything that its jobs run there are gone at once."""
        process = self._daemons.pop(node)
        process.kill()
        process.wait()
        for pid in self._processes_on(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_on(self, node: str, program: str) -> None:
        """SIGKILL to a job's processes of that name on a node."""
        found = [pid for pid in self._processes_on(node) if _read(pid, "comm").strip() == program.encode()]
        assert found
        for pid in found:
            os.kill(pid, signal.SIGKILL)

    def _processes_on(self, node: str) -> set[int]:
        """All that its jobs run there: some of it has Slurm's variables no longer, but descends from what has them."""
        wanted = f"SLURMD_NODENAME={node}".encode()
        mine = processes(lambda entry: wanted in (entry / "environ").read_bytes().split(b"\0"))
        parents = {int(_read(pid, "stat").rpartition(b")")[2].split()[1]) for pid in mine if _read(pid, "stat")}
        daemons = {pid for pid in parents if _read(pid, "comm").startswith(b"slurmstepd")}
        return {*daemons, *mine, *(below for pid in mine for below in descendants(pid))}

    def until_idle(self) -> None:
        self._until(lambda: self.idle_nodes() == len(NODES), "idle nodes")

    def run(self, *words: str, env: Mapping[str, str] | None = None, check: bool = True) -> str:
        """A client's stdout."""
        done = subprocess.run(
            words, env={**os.environ, **self.variables, **(env or {})}, capture_output=True, text=True, timeout=60
        )
        assert not check or done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def idle_nodes(self) -> int:
        return self.run("sinfo", "-h", "-N", "-p", "low", "-t", "idle", "-o", "%N", check=False).count("n")

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        text = self.run("scontrol", "-o", "show", "job", number)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, number: str, seconds: float = 240.0) -> dict[str, str]:
        """The job once it ended."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in ENDED or _goes_back(job):
            assert time.monotonic() < deadline, f"job {number} is {job['JobState']} ({job.get('Reason')})"
            self.let_go()
            time.sleep(0.2)
        return job

    def let_go(self) -> None:
        """Start requeued jobs in 3 seconds instead of after Slurm's two minutes.

        Not in the second of their end: slurmd, whose clock for that has whole seconds, would take the new launch for
        one that it was told to kill ("Job credential revoked").
        """
        for line in self.run("squeue", "-h", "-t", "PENDING", "-o", "%A %S %r", check=False).splitlines():
            number, start, reason = line.split(maxsplit=2)
            with contextlib.suppress(ValueError):  # N/A
                left = (datetime.fromisoformat(start) - datetime.now()).total_seconds()
                if reason == "BeginTime" and left > 10:
                    self.run("scontrol", "update", f"JobId={number}", "StartTime=now+3", check=False)

    def clear(self, seconds: float = 60.0) -> None:
        """End all jobs and wait until nothing of them runs."""
        deadline = time.monotonic() + seconds
        while jobs := self.run("squeue", "-h", "-o", "%A", check=False).split():
            self.run("scancel", *set(jobs), check=False)
            assert time.monotonic() < deadline, f"jobs do not end: {jobs}"
            time.sleep(0.2)
        while left := self.left():
            assert time.monotonic() < deadline, f"still running: {left}"
            time.sleep(0.2)

    def left(self) -> list[str]:
        """Processes of jobs that still run on the nodes, with what started them."""
        mark = f"{MARK}={self.root}".encode()
        found = processes(lambda entry: mark in (entry / "environ").read_bytes().split(b"\0"))
        return [f"{pid}: {_read(pid, 'cmdline')[:120]!r}" for pid in found]

    def _configure(self) -> None:
        for name in ("state", "log", "munge", *(f"spool/{node}" for node in NODES)):
            (self.root / name).mkdir(parents=True)
        first, last = FIRST_PORT + 1, FIRST_PORT + len(NODES)
        values = {
            "host": socket.gethostname().split(".")[0],
            "root": self.root,
            "port": FIRST_PORT,
            "nodes": f"n[1-{len(NODES)}]",
            "ports": f"[{first}-{last}]",
            "cpus": CPUS,
        }
        (self.root / "slurm.conf").write_text(CONF.format(**values))
        for number in range(2):  # devices that are no GPUs, to see who hands out what
            os.mknod(self.root / f"gpu{number}", 0o20666, os.makedev(1, 3))
        (self.root / "gres.conf").write_text(f"Name=gpu File={self.root}/gpu[0-1]\n")

    def _munge_words(self) -> list[str]:
        folder = self.root / "munge"
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = [f"--{name}-file={folder}/{name}" for name in ("key", "log", "pid", "seed")]
        return ["munged", "--foreground", "--force", f"--socket={folder}/socket", *files]

    def _start(self, name: str, program: str, *words: str) -> None:
        path = _program(program)
        assert path
        variables = {"PATH": os.environ["PATH"], "SLURM_CONF": self.variables["SLURM_CONF"]}
        with (self.root / f"log/{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [path, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=variables, preexec_fn=_end_with_parent,
            )  # fmt: skip

    def _until(self, condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            for name, process in self._daemons.items():
                assert process.poll() is None, f"{name} ended: {self._log(name)}"
            assert time.monotonic() < deadline, f"no {what} within {seconds} s"
            time.sleep(0.05)

    def _log(self, name: str) -> str:
        return (self.root / f"log/{name}.out").read_text()[-2000:]


def _goes_back(job: Mapping[str, str]) -> bool:
    """A job of a lost node is NODE_FAIL for a moment before it is pending again."""
    return job["JobState"] == "NODE_FAIL" and job["Requeue"] == "1"


def _end_with_parent() -> None:
    """In the child: if the tests are killed, so are the daemons."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def processes(condition: Callable[[Path], bool]) -> list[int]:
    """Ids of processes whose folder in /proc meets a condition."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and int(entry.name) != os.getpid() and condition(entry):
                found.append(int(entry.name))
    return found


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


if __name__ == "__main__":
    reason = what_is_missing()
    if reason:
        sys.exit(reason)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with Slurm() as cluster:
        print(f"export SLURM_CONF={cluster.variables['SLURM_CONF']}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
