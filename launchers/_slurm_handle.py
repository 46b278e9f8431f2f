"""A job in Slurm, followed from here: its state from scontrol or sacct, its output and its result from its files."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from swift_dist.errors import EXIT_INTERRUPTED, JobError, RunError
from swift_dist.launchers._base import Handle, State, Submission, raise_told

log = logging.getLogger(__name__)

_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_RUNNING = {"RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING", "SUSPENDED", "STOPPED"}
_PASSING = {"NODE_FAIL", "PREEMPTED", "BOOT_FAIL"}
"""Seen of a job that may be requeued while its nodes clean up; PENDING follows."""
_PASSING_SECONDS = 180.0
_COMMAND_SECONDS = 60.0
_LOST_SECONDS = 600.0
"""How long a controller may be away (it is restarted now and then) before a follower gives up."""
_RESULT_SECONDS = 10.0
"""For a result written on the job's node to be seen on this machine: shared file systems remember what was there."""

CODES = {
    72: "not all nodes joined its Ray cluster in time (launch.slurm.join_timeout)",
    73: "Ray ended on one of its nodes",
    74: "its log folder cannot be seen from all of its nodes",
    75: "it was restarted more often than launch.slurm.max_restarts",
}
"""Exit codes of slurm/ray_cluster.sh."""


class NoController(RunError):
    """slurmctld does not answer."""


@dataclass(frozen=True)
class JobState:
    """What Slurm says: its word for the state, exit code and signal of the batch script, why it waits.

    Attributes:
        goes_back: whether the job may go back into the queue, and ended only a moment ago.
    """

    word: str
    code: int = 0
    signal: int = 0
    reason: str = ""
    goes_back: bool = False

    @property
    def state(self) -> State:
        if self.word in _WAITING or (self.word in _PASSING and self.goes_back):
            return "waiting"
        if self.word in _RUNNING:
            return "running"
        if self.word == "COMPLETED":
            return "done"
        # CANCELLED; or the driver's own word for it
        interrupted = self.word.startswith("CANCELLED") or (self.word == "FAILED" and self.code == EXIT_INTERRUPTED)
        return "interrupted" if interrupted else "failed"


def slurm(*words: str) -> str:
    """stdout of one of Slurm's commands.

    Raises:
        JobError: there is no such command here.
        NoController: slurmctld does not answer.
        RunError: with what it said.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False)
    except FileNotFoundError:
        raise JobError(
            "--launcher", f"there is no {words[0]} on this machine", "run it on a login node of the cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise NoController(f"{words[0]} did not answer within {_COMMAND_SECONDS:.0f} s") from None
    if done.returncode == 0:
        return done.stdout
    said = " ".join(done.stderr.split()) or f"{words[0]} ended with exit code {done.returncode}"
    if re.search("Unable to contact slurm controller|Socket timed out|Connection refused", said):
        raise NoController(said)
    raise RunError(said)


def job_state(number: str) -> JobState:
    """The newest word on a job: the controller's, or of one that it has forgotten the accounting's.

    Raises:
        NoController: neither answers.
        RunError: neither knows it.
    """
    try:
        text = slurm("scontrol", "-o", "show", "job", number)
    except NoController:
        raise
    except RunError as unknown:
        return _accounted(number, unknown)
    facts = dict(re.findall(r"(\w+)=(\S*)", text))
    code, _, signal = facts.get("ExitCode", "0:0").partition(":")
    goes_back = facts.get("Requeue") == "1" and _seconds_since(facts.get("EndTime", "")) < _PASSING_SECONDS
    return JobState(facts["JobState"], int(code), int(signal), facts.get("Reason", ""), goes_back)


def _seconds_since(stamp: str) -> float:
    """Since a time as Slurm writes it (local, without a zone); 0 where it is none, or in the future."""
    try:
        return max(0.0, (datetime.now() - datetime.fromisoformat(stamp)).total_seconds())
    except ValueError:
        return 0.0


def _accounted(number: str, unknown: RunError) -> JobState:
    try:
        rows = slurm("sacct", "-n", "-X", "-P", "-D", "-j", number, "-o", "State,ExitCode").split("\n")
    except (JobError, RunError):  # sites without accounting
        raise unknown from None
    newest = [row for row in rows if row.strip()][-1:]  # a requeued job has several
    if not newest:
        raise unknown
    word, _, codes = newest[0].partition("|")
    code, _, signal = codes.partition(":")
    return JobState(word.split()[0], int(code), int(signal))


class SlurmHandle(Handle):
    """A job in Slurm.

    Args:
        submission: which; its `address` is the job's output file.
        run: its run folder.
        follow: whether `wait` shows what it prints and waits, or returns at once.
    """

    def __init__(self, submission: Submission, run: Path | None = None, *, follow: bool = True) -> None:
        self._submission, self._run, self._follow = submission, run, follow
        self._id, self._log = submission.id, Path(submission.address)
        self._result_path = self._log.with_suffix(".d") / "result.json"

    def status(self) -> State:
        return self._state().state

    def stop(self) -> None:
        """A job that waits is cancelled; one that runs checkpoints and ends."""
        if self._state().state == "waiting":
            slurm("scancel", self._id)
        else:
            # To the batch script alone: the ranks must live until the checkpoint is written.
            slurm("scancel", "--batch", "--signal=TERM", self._id)

    def run_beside(self, words: Sequence[str]) -> tuple[int, str]:
        """Run a command on the job's first node, with its CPUs; its exit code and stdout. Outside of a container.

        Raises:
            RunError: the job does not run there (any more).
        """
        host = re.search(r"\bBatchHost=(\S+)", slurm("scontrol", "-o", "show", "job", self._id))
        if host is None:
            raise RunError(f"Slurm job {self._id} runs on no node", f"squeue -j {self._id} says why")
        step = ["srun", f"--jobid={self._id}", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={host[1]}"]
        done = subprocess.run(
            [*step, "--mpi=none", "--quiet", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        return done.returncode, done.stdout

    def logs(self, follow: bool = False) -> Iterator[str]:
        position, rest, began, lost, ended = 0, "", time.monotonic(), 0.0, not follow
        while True:
            text, position = self._read(position)
            *lines, rest = (rest + text).split("\n")
            yield from lines
            if ended:
                break
            try:
                ended = self.status() not in ("waiting", "running")
                lost = 0.0
            except NoController as error:
                lost = lost or self._warn(error)
                if time.monotonic() - lost > _LOST_SECONDS:
                    raise
            if not ended:
                self._rest(time.monotonic() - began)
        if rest:
            yield rest

    def wait(self) -> dict[str, Any]:
        if not self._follow:
            return self._pending()
        try:
            for line in self.logs(follow=True):
                print(line, file=sys.stderr, flush=True)
            return self._result()
        except KeyboardInterrupt as error:
            if error.args:
                raise  # the job's own end
            raise KeyboardInterrupt(
                f"detached: Slurm job {self._id} goes on\n"
                f"  see it again: swift-dist runs logs {self._run} --follow\n"
                f"  end it: swift-dist runs stop {self._run}"
            ) from None

    def _pending(self) -> dict[str, Any]:
        nothing = dict.fromkeys(("export", "export_step", "message", "step", "loss", "checkpoint"))
        return {
            "state": self.status(),
            "output": str(self._run),
            **nothing,
            "restarts": 0,
            "seconds": 0.0,
            "submission": asdict(self._submission),
        }

    def _state(self) -> JobState:
        try:
            return job_state(self._id)
        except NoController:
            raise
        except RunError as unknown:  # Slurm has forgotten it; its result stays
            result = _read_json(self._result_path)
            if result is None:
                raise RunError(f"Slurm knows no job {self._id}, and it left no result: {unknown}") from None
            if "error" in result:
                return JobState("FAILED", result["exit_code"])
            in_order = result["state"] in ("done", "stopped")  # a job's end, a deployment's
            return JobState("COMPLETED") if in_order else JobState("FAILED", EXIT_INTERRUPTED)

    def _read(self, position: int) -> tuple[str, int]:
        """What the output file holds from a position (in bytes) on, and where it ends."""
        try:
            with self._log.open("rb") as file:
                file.seek(position)
                data = file.read()
        except OSError:  # it does not run yet
            return "", position
        return data.decode(errors="replace"), position + len(data)

    def _rest(self, elapsed: float) -> None:
        """Until the next look: a busy controller is asked every 20 s; a new result is taken at once."""
        deadline, before = time.monotonic() + min(20.0, max(1.0, elapsed / 20)), self._result_time()
        while time.monotonic() < deadline and self._result_time() == before:
            time.sleep(0.5)

    def _result_time(self) -> float:
        try:
            return self._result_path.stat().st_mtime
        except OSError:
            return 0.0

    def _warn(self, error: RunError) -> float:
        log.warning("Slurm does not answer, trying again (the job does not need it): %s", error)
        return time.monotonic()

    def _result(self) -> dict[str, Any]:
        """Of the ended job: what its driver returned or raised, or what ended it instead."""
        ended = self._state()
        deadline = time.monotonic() + _RESULT_SECONDS
        while (result := _read_json(self._result_path)) is None and time.monotonic() < deadline:
            if ended.word not in ("COMPLETED", "FAILED"):
                break
            time.sleep(0.5)
        if result and "error" not in result and (ended.state in ("done", "interrupted")):
            return result
        if result and "error" in result and ended.code == result["exit_code"]:
            raise_told(result)
        if ended.state == "interrupted":
            raise KeyboardInterrupt(f"Slurm job {self._id} was cancelled; what its newest checkpoint holds is there")
        raise RunError(self._describe(ended), f"see {self._log} and {self._result_path.parent}/ray_*.log")

    def _describe(self, ended: JobState) -> str:
        codes = f"{ended.code}:{ended.signal}"
        text = f"Slurm job {self._id} ended as {ended.word} {codes}"
        if ended.word == "FAILED" and ended.code in CODES:
            text += f": {CODES[ended.code]}"
        elif ended.word == "TIMEOUT":
            text += ": the time limit came before its checkpoint (launch.slurm.signal_seconds is the notice it gets)"
        return text


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
