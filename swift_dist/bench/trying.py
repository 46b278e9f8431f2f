"""One try: a length in fresh processes, a rank each, so that one that runs out of memory is only a try that failed."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from swift_dist.bench.plan import Series
from swift_dist.bench.search import Try
from swift_dist.cluster.environment import NodeFacts, environment, without_dropped
from swift_dist.errors import JobError, RunError
from swift_dist.runs.files import read_json, write_json
from swift_dist.runs.throughput import resident_peak

_LOOK_SECONDS = 0.05
_WORD_SECONDS = 3.0
"""For other ranks to say why they ended, once one has: the first to end may only have lost the one that failed."""

Process = subprocess.Popen[bytes]


def attempt(series: Series, length: int, logs: Path, timeout: float) -> Try:
    """Train `series` for some steps on sequences of `length` tokens.

    Args:
        series: what to train.
        length: tokens of a sequence.
        logs: folder of the ranks' logs; those of the try before are replaced.
        timeout: seconds that it may take.

    Raises:
        JobError: a rank found the job wrong.
        RunError: it failed, and not for want of memory or time.
    """
    with tempfile.TemporaryDirectory(prefix="swift_dist-") as scratch:
        folder = Path(scratch)
        write_json(folder / "try.json", series.of_length(length))
        with _ranks(series, folder, logs) as ranks:
            stopped = _watch(series, length, ranks, timeout)
            codes = [rank.poll() for rank in ranks]
        ends = [read_json(folder / f"rank_{number}.json") for number in range(len(ranks))]
    if stopped is not None:
        return stopped
    return _judged(series, length, codes, ends, logs)


@contextmanager
def _ranks(series: Series, folder: Path, logs: Path) -> Iterator[list[Process]]:
    """The ranks' processes, none of which outlives the block."""
    logs.mkdir(exist_ok=True)
    facts = NodeFacts(series.num_ranks, len(os.sched_getaffinity(0)), None, series.on_cuda)
    variables = {**without_dropped(os.environ), **environment(os.environ, series.job.cluster, facts)}
    with ExitStack() as opened:
        ranks: list[Process] = []
        try:
            for number in range(series.num_ranks):
                log = opened.enter_context((logs / f"rank_{number}.log").open("wb"))
                command = [sys.executable, "-m", "swift_dist.bench.rank", str(folder / "try.json")]
                command += [str(number), str(os.getpid())]
                ranks.append(
                    subprocess.Popen(
                        command,
                        env=variables,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,  # the terminal's Ctrl-C is the driver's to act on
                    )
                )
            yield ranks
        finally:
            for rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.pid, signal.SIGKILL)
            for rank in ranks:
                rank.wait()


def _watch(series: Series, length: int, ranks: list[Process], timeout: float) -> Try | None:
    """Until all ranks have ended (None), or it is decided before: on the CPU a rank took more than it may, or time is
    up."""
    deadline, peak = time.monotonic() + timeout, 0
    while None in (codes := [rank.poll() for rank in ranks]):
        if series.memory is not None and not series.on_cuda:
            sizes = [resident_peak(rank.pid) for rank in ranks]
            peak = max(peak, *sizes)
            if peak > series.memory:
                reason = f"rank {sizes.index(max(sizes))} took {peak / 2**30:.2f} GiB, and had not ended"
                return Try(length, False, peak, None, reason)
        if any(codes):
            deadline = min(deadline, time.monotonic() + _WORD_SECONDS)
        if time.monotonic() > deadline:
            if any(codes):
                return None
            return Try(length, False, peak or None, None, f"it had not ended after {timeout:g} s", timed_out=True)
        time.sleep(_LOOK_SECONDS)
    return None


def _judged(series: Series, length: int, codes: list[int | None], ends: list[dict[str, Any] | None], logs: Path) -> Try:
    """What a try came to, of the ranks' exit codes (None: it was still waiting for another) and last words."""
    by_kind: dict[str, dict[str, Any]] = {}
    for end in reversed([end for end in ends if end is not None]):
        by_kind[end["kind"]] = end
    if "memory" in by_kind:
        return Try(length, False, None, None, by_kind["memory"]["message"])
    if -signal.SIGKILL in codes:
        return Try(length, False, None, None, f"rank {codes.index(-signal.SIGKILL)} was killed: no memory was left")
    if "job" in by_kind:
        raise JobError(*(by_kind["job"][name] for name in ("key", "message", "remedy")))
    words = f"{series.features} with {series.sharing} ranks a sequence, {length:,} tokens"
    for kind in ("run", "error"):
        if kind in by_kind:
            raise RunError(f"{words}: {by_kind[kind]['message']}", f"see {logs}/rank_*.log")
    if any(codes) or None in codes:
        raise RunError(f"{words}: ranks ended with {codes} and without a word", f"see {logs}/rank_*.log")
    results = [end for end in ends if end is not None]
    peak = max(end["peak_bytes"] for end in results)
    if series.memory is not None and peak > series.memory:
        return Try(length, False, peak, None, f"a rank took {peak / 2**30:.2f} GiB")
    steps = [max(together) for together in zip(*(end["seconds"] for end in results), strict=True)]
    return Try(length, True, peak, statistics.median(steps[1:]))
