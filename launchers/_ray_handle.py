"""A job on a Ray cluster, followed from here: over lost connections, and to its real end."""

from __future__ import annotations

import contextlib
import logging
import secrets
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from swift_dist.errors import EXIT_INTERRUPTED, EXIT_JOB_WRONG, JobError, RunError
from swift_dist.launchers._base import Handle, State, Submission
from swift_dist.launchers._ray_client import RayJobs, Unreachable

log = logging.getLogger(__name__)

_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_RETRY_SECONDS = 2.0
_BESIDE_SECONDS = 0.5
_LONGEST_MESSAGE = 30  # lines


class RayHandle(Handle):
    """A job on a Ray cluster.

    Args:
        submission: which.
        run: its run folder, where this handle is to say how it ended.
        attempts: that the run had before; they are not this job's.
        follow: whether `wait` shows what it prints and waits, or returns at once.
        is_service: whether it is a deployment: its end is that it was stopped.
        reconnect_timeout: seconds to look for a cluster that no longer answers.
    """

    def __init__(
        self,
        submission: Submission,
        run: Path | None = None,
        *,
        attempts: int = 0,
        follow: bool = True,
        is_service: bool = False,
        reconnect_timeout: float = 600.0,
    ) -> None:
        self._id, self._address = submission.id, submission.address
        self._submission, self._run, self._attempts = submission, run, attempts
        self._follow, self._is_service, self._reconnect_timeout = follow, is_service, reconnect_timeout
        self._jobs_of_address: RayJobs | None = None

    @property
    def _jobs(self) -> RayJobs:
        if self._jobs_of_address is None:
            self._jobs_of_address = RayJobs(self._address)
        return self._jobs_of_address

    def status(self) -> State:
        return state_of(self._jobs.info(self._id))

    def stop(self) -> None:
        self._jobs.stop(self._id)

    def run_beside(self, words: Sequence[str]) -> tuple[int, str]:
        """Run a command on the node where the job's driver runs, in the job's environment, as a Ray job of its own.

        Returns:
            its exit code and all that it printed.

        Raises:
            RunError: the job does not run (any more), or Ray could not run the command.
        """
        info = self._jobs.info(self._id)
        if state_of(info) != "running" or info.driver_info is None:
            raise RunError(f"{self._id} at {self._address} is {state_of(info)}; its driver does not run", "try again")
        beside = f"{self._id}-{secrets.token_hex(3)}"
        self._jobs.submit(
            entrypoint=f"exec {shlex.join(words)}",
            submission_id=beside,
            runtime_env=info.runtime_env,
            entrypoint_resources={f"node:{info.driver_info.node_ip_address}": 0.001},
        )
        while (done := self._jobs.info(beside)).status not in _ENDED:
            time.sleep(_BESIDE_SECONDS)
        if done.driver_exit_code is None:
            raise RunError(f"Ray could not run it: {(done.message or 'no reason given').strip().splitlines()[-1]}", "")
        return done.driver_exit_code, self._jobs.text(beside)

    def logs(self, follow: bool = False) -> Iterator[str]:
        pieces = self._followed() if follow else iter([self._jobs.text(self._id)])
        rest = ""
        for piece in pieces:
            *lines, rest = (rest + piece).split("\n")
            yield from lines
        if rest:
            yield rest

    def wait(self) -> dict[str, Any]:
        if not self._follow:
            return self._pending()
        try:
            held = _show(self.logs(follow=True))
            result = self._result()
            print(*held, sep="\n", end="\n" * bool(held), file=sys.stderr)
            return result
        except KeyboardInterrupt as error:
            if error.args:
                raise  # the job's own end
            # `runs stop` has Ray signal the driver's children too, and a deployment's front is one of them.
            stop = "deploy --stop --output" if self._is_service else "runs stop"
            raise KeyboardInterrupt(
                f"detached: the job goes on as {self._id} at {self._address}\n"
                f"  see it again: swift-dist runs logs {self._run} --follow\n"
                f"  end it: swift-dist {stop} {self._run}"
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

    def _followed(self) -> Iterator[str]:
        """What it prints, from the beginning to its end, each character once, over any number of connections."""
        seen, lost = 0, 0.0
        while True:
            try:
                skip = seen
                for piece in self._jobs.tail(self._id):
                    if piece is None:
                        if self._jobs.info(self._id).status in _ENDED:
                            break
                        continue
                    lost = self._back(lost)
                    if skip < len(piece):
                        seen += len(piece) - skip
                        yield piece[skip:]
                    skip = max(0, skip - len(piece))
                info = self._jobs.info(self._id)
                lost = self._back(lost)
                if info.status in _ENDED:
                    with contextlib.suppress(RunError):  # its node may be gone, and the log with it
                        yield self._jobs.text(self._id)[seen:]
                    return
            except Unreachable as error:
                lost = self._lost(lost, error)
            time.sleep(_RETRY_SECONDS)

    def _lost(self, since: float, error: Unreachable) -> float:
        self._jobs_of_address = None
        if not since:
            log.warning("connection lost, trying again (the job does not need it): %s", error)
            return time.monotonic()
        if time.monotonic() - since > self._reconnect_timeout:
            raise RunError(
                f"{error} for {self._reconnect_timeout:g} s (launch.ray.reconnect_timeout)",
                f"the job may still run; look again: swift-dist runs logs {self._run or 'RUN'} --follow",
            )
        return since

    def _back(self, since: float) -> float:
        if since:
            log.warning("connected again after %.0f s", time.monotonic() - since)
        return 0.0

    def _result(self) -> dict[str, Any]:
        """The job's end in our words: from its real status and its driver's exit code, not from Ray's CLI."""
        info = self._jobs.info(self._id)
        code = info.driver_exit_code
        result = self._read_outcome()
        if info.status == "SUCCEEDED":
            seconds = ((info.end_time or 0) - (info.start_time or 0)) / 1000
            return result or {**self._pending(), "seconds": seconds}  # a run folder that cannot be seen from here
        if info.status == "STOPPED" and self._is_service:
            return {**self._pending(), "state": "stopped"}
        if info.status == "STOPPED" or code == EXIT_INTERRUPTED:
            if result and result["state"] == "interrupted" and result["checkpoint"] is not None:
                return result
            raise KeyboardInterrupt(f"{self._id} was stopped before anything could be saved")
        words = self._last_words()
        if code == EXIT_JOB_WRONG and words:
            key, _, message = words[0].partition(": ")
            raise JobError(key, message, words[1])
        if words and code is not None and code > 0:
            raise RunError(words[0], words[1])
        raise RunError(*_unexplained(info, code, self._tail_of_log()))

    def _read_outcome(self) -> dict[str, Any] | None:
        from swift_dist.runs.outcome import read_outcome

        return read_outcome(self._run, after=self._attempts) if self._run else None

    def _last_words(self) -> tuple[str, str] | None:
        """Message and remedy that the job's `swift-dist` printed at its end."""
        with contextlib.suppress(RunError):
            _, found, text = ("\n" + self._jobs.text(self._id)).rpartition("\nswift-dist: ")
            if found:
                message, _, remedy = text.partition("\n  remedy: ")
                return message.strip(), remedy.strip()
        return None

    def _tail_of_log(self, lines: int = 5) -> str:
        with contextlib.suppress(RunError):
            return "\n".join(self._jobs.text(self._id).rstrip().split("\n")[-lines:])
        return ""


def _show(lines: Iterator[str]) -> list[str]:
    """On stderr, all but the message with which the job's `swift-dist` ends: that becomes the error of this one."""
    held: list[str] = []
    for line in lines:
        if line.startswith("swift-dist: ") or len(held) > _LONGEST_MESSAGE:
            print(*held, sep="\n", end="\n" * bool(held), file=sys.stderr)
            held = []
        if held or line.startswith("swift-dist: "):
            held.append(line)
        else:
            print(line, file=sys.stderr, flush=True)
    return held


def state_of(info: Any) -> State:
    """Our state of Ray's JobDetails."""
    if info.status == "FAILED":
        return "interrupted" if info.driver_exit_code == EXIT_INTERRUPTED else "failed"
    states: dict[str, State] = {"PENDING": "waiting", "RUNNING": "running", "SUCCEEDED": "done"}
    return states.get(info.status, "interrupted")


def _unexplained(info: Any, code: int | None, tail: str) -> tuple[str, str]:
    """Message and remedy for a job that ended without a word of `swift-dist`."""
    if code is None:
        reason = (info.message or "no reason given").strip().splitlines()[-1]
        return f"Ray could not run the job: {reason}", ""
    if code in (-9, 137):
        return (
            "the job's driver was killed (signal 9)",
            "a minute from now the same command goes on from the newest checkpoint; was it the out-of-memory killer?",
        )
    if code == 127:
        return (
            f"the job's node has no command swift-dist: {tail.splitlines()[-1] if tail else 'exit code 127'}",
            "start Ray on the nodes from the environment that swift-dist is installed in",
        )
    ended = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"the job's driver ended with {ended}" + (f"; the last it printed:\n{tail}" if tail else ""), ""
