"""The page of a rank that torchrun started: ``python -m swift_dist.torchrun.rank RUN_FOLDER``."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from swift_dist.cluster.environment import num_threads
from swift_dist.cluster.failures import is_communication_error
from swift_dist.config.load import load_job
from swift_dist.errors import EXIT_FAILED, JobError, RunError
from swift_dist.lifetime import end_with_parent
from swift_dist.resolve import resolve
from swift_dist.runs.files import write_json
from swift_dist.runs.folder import RunFolder
from swift_dist.runs.logs import write_into

if TYPE_CHECKING:
    import torch.distributed

log = logging.getLogger(__name__)

REPORTS = "SWIFT_DIST_REPORTS"
"""Variable with the folder into which ranks write how they ended."""
_LOOK_SECONDS = 0.5


class TorchrunWorker:
    """`swift_dist.runs.worker.Worker` from the variables that torchrun sets."""

    def __init__(self, folder: RunFolder, on_cuda: bool) -> None:
        def number(name: str) -> int:
            return int(os.environ[name])

        self.rank, self.world_size = number("RANK"), number("WORLD_SIZE")
        self.local_rank, self.local_world_size = number("LOCAL_RANK"), number("LOCAL_WORLD_SIZE")
        self.node_rank, self.attempt = number("GROUP_RANK"), number("TORCHELASTIC_RESTART_COUNT")
        self.device = f"cuda:{self.local_rank}" if on_cuda else "cpu"
        self.run_dir = folder.path
        self.step = 0
        self._folder, self._stop, self._looked = folder, False, 0.0
        self._store: torch.distributed.Store | None = None

    def store(self) -> torch.distributed.Store:
        """torchrun's agent on the first node serves it; each attempt has its own names in it."""
        if self._store is None:
            from torch.distributed import PrefixStore, rendezvous

            store, _, _ = next(iter(rendezvous("env://")))
            self._store = PrefixStore(f"attempt_{self.attempt}", store)
        return self._store

    def beat(self, phase: str, step: int) -> None:
        """Nobody listens: what stalls under torchrun ends by the collectives' own timeout."""
        self.step = step

    def stop_requested(self) -> bool:
        """Rank 0 looks into the run folder, at most twice a second; all ranks stop together with it."""
        if self.rank == 0 and not self._stop and time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            self._stop = self._folder.stop_requested()
        return self._stop

    def ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: SIGTERM to a rank asks all of them."""
        self._stop = True


def main(path: str) -> int:
    """Train as this rank of the run in `path`; returns the exit code. How it ended lies in the reports' folder."""
    # torchrun puts ranks into sessions of their own: killed, it would leave them behind.
    end_with_parent()
    folder = RunFolder(path)
    on_cuda = os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    worker = TorchrunWorker(folder, on_cuda)
    signal.signal(signal.SIGTERM, worker.ask_to_stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver alone acts on Ctrl-C
    write_into(folder.logs / f"rank_{worker.rank}.log")
    log.info("attempt %d: rank %d of %d, device %s, process %d", worker.attempt, worker.rank, worker.world_size,
             worker.device, os.getpid())  # fmt: skip
    reports = Path(os.environ[REPORTS])
    who = {"rank": worker.rank, "attempt": worker.attempt}
    place = {"kind": "place", **who, "host": os.uname().nodename, "threads": num_threads(os.environ)}
    write_json(reports / f"place_{worker.rank}.json", place)
    report = reports / f"rank_{worker.rank}.json"
    try:
        job = load_job(folder.job_path, task=None)
        resolved = resolve(job, nproc_per_node=worker.local_world_size, on_cuda=on_cuda, output=str(folder.path))
        from swift_dist import train

        payload = resolved.payload()
        train.warm(payload)
        result = train.main(payload, worker)
    except Exception as error:
        log.exception("rank %d failed", worker.rank)
        write_json(report, {**_describe(error, worker), **who})
        return EXIT_FAILED
    write_json(report, {"kind": "result", "result": result, **who})
    return 0


def _describe(error: Exception, worker: TorchrunWorker) -> dict[str, Any]:
    kind = "job" if isinstance(error, JobError) else "run" if isinstance(error, RunError) else "error"
    if kind == "error" and is_communication_error(error):
        kind = "communication"
    message = error.message if isinstance(error, (JobError, RunError)) else traceback.format_exception_only(error)[-1]
    return {
        "kind": kind,
        "key": getattr(error, "key", ""),
        "message": message.strip(),
        "remedy": getattr(error, "remedy", ""),
        "step": worker.step,
        "time": time.time(),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
