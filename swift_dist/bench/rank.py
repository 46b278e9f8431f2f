"""The page of a rank of one try: ``python -m swift_dist.bench.rank TRY.json RANK PARENT``."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_dist.cluster.failures import is_communication_error
from swift_dist.config import JobConfig
from swift_dist.errors import EXIT_FAILED, JobError, RunError
from swift_dist.lifetime import end_with_parent
from swift_dist.runs.files import read_json, write_json

if TYPE_CHECKING:
    import torch.distributed

    from swift_dist.engines import MicroBatch

log = logging.getLogger(__name__)

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""What allocators say that raise no error of their own kind: cuBLAS, NCCL, torch's on the CPU."""


class TryWorker:
    """`swift_dist.runs.worker.Worker` of a rank that lives for one try, on one machine."""

    node_rank = attempt = 0

    def __init__(self, folder: Path, rank: int, world_size: int, on_cuda: bool) -> None:
        self.rank = self.local_rank = rank
        self.world_size = self.local_world_size = world_size
        self.device = f"cuda:{rank}" if on_cuda else "cpu"
        self.run_dir = folder

    def store(self) -> torch.distributed.Store:
        from torch.distributed import FileStore

        return FileStore(str(self.run_dir / "store"), self.world_size)

    def beat(self, phase: str, step: int) -> None:
        """Nobody listens."""

    def stop_requested(self) -> bool:
        return False


def main(path: str, rank: int, parent: int) -> int:
    """Take part in the try that `path` describes, and that process `parent` makes; how it ended is in ``rank_<n>.json``
    beside it."""
    end_with_parent(parent=parent)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    plan = read_json(Path(path))
    assert plan is not None, path
    folder = Path(path).parent
    try:
        end = _try(plan, TryWorker(folder, rank, plan["world_size"], plan["on_cuda"]))
    except Exception as error:
        log.exception("rank %d failed", rank)
        end = _describe(error)
    write_json(folder / f"rank_{rank}.json", end)
    return 0 if end["kind"] == "result" else EXIT_FAILED


def _try(plan: dict[str, Any], worker: TryWorker) -> dict[str, Any]:
    """The steps of a try, by the engine that runs `swift-dist sft`, on made-up tokens."""
    from swift_dist.engines import build_engine

    job = JobConfig.model_validate(plan["job"])
    if plan["on_cuda"] and plan["memory"]:
        _keep_within(plan["memory"], worker.device)
    engine = build_engine(job, plan["hf_config"], worker)
    try:
        seconds = []
        for step in range(plan["steps"]):
            batch = _made_up(engine, job, plan["vocab_size"], step)
            began = time.perf_counter()
            engine.train_step([batch], step)
            seconds.append(time.perf_counter() - began)
        return {"kind": "result", "seconds": seconds, "peak_bytes": _peak_bytes(worker.device)}
    finally:
        engine.close()


def _keep_within(memory: int, device: str) -> None:
    """Torch's allocator fails beyond this many bytes, as it would on a smaller GPU.

    Raises:
        JobError: the GPU has less.
    """
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    if memory > total:
        sizes = f"{memory / 2**30:.2f} GiB, and {device} has {total / 2**30:.2f}"
        raise JobError("memory", sizes, f"at most --memory {total // 2**20}MiB, or leave it out")
    torch.cuda.set_per_process_memory_fraction(memory / total, device)


def _made_up(engine: Any, job: JobConfig, vocab_size: int, step: int) -> MicroBatch:
    """A micro-batch of one sequence of random tokens that all learn; the same on the ranks that share it."""
    import numpy as np

    from swift_dist.data.samples.collate import Collator
    from swift_dist.data.samples.dataset import Example
    from swift_dist.data.templates.base import Encoded

    length = job.data.sequence_length
    ids = np.random.default_rng([step, engine.data.dp_rank]).integers(0, vocab_size, length, dtype=np.int32)
    return Collator(engine.batch_layout, engine.pad_id)([Example((Encoded(ids, np.ones(length, np.float32)),))])


def _peak_bytes(device: str) -> int:
    """On a GPU what torch's allocator held at most (`_keep_within` counts the same); on the CPU the process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_reserved(device)
    from swift_dist.runs.throughput import resident_peak

    return resident_peak()


def _describe(error: Exception) -> dict[str, Any]:
    """A failure: ``memory``, ``job``, ``run``, ``communication`` (another rank's doing) or ``error``."""
    if isinstance(error, JobError):
        return {"kind": "job", "key": error.key, "message": error.message, "remedy": error.remedy}
    message = traceback.format_exception_only(error)[-1].strip()
    if is_out_of_memory(error):
        return {"kind": "memory", "message": message.splitlines()[0]}
    if isinstance(error, RunError):
        return {"kind": "run", "message": error.message, "remedy": error.remedy}
    return {"kind": "communication" if is_communication_error(error) else "error", "message": message}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator said no, in this error or in one that led to it."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    if isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and is_out_of_memory(cause)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
