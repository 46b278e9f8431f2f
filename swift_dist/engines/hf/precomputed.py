"""The reference model's log-probabilities, computed once before the first step: while a model learns, no second one is
held. (TRL: ``precompute_ref_log_probs``.)

What is kept of a sequence is the sum over its tokens of loss weight * log-probability, in float64, which is all that an
objective reads of a reference. It lies in the run folder, a file of plain numbers for each store of samples, NaN where
nothing was computed yet:

    reference/<model>-<samples>-<n>.bin   float64 [sequences of the store], the n-th of this content

The names are hashes of what the numbers were computed from, so a resume finds what is still right and computes the
rest: what a killed pass had not come to, the samples of further steps, those of other data or another model.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from swift_dist.config import JobConfig
from swift_dist.data.samples.loader import SampleData
from swift_dist.data.samples.store import checksum
from swift_dist.engines.hf.batches import Prepared
from swift_dist.engines.hf.reference import Reference, source
from swift_dist.errors import RunError
from swift_dist.models import model_folder
from swift_dist.objectives._sequences import weighted_sums
from swift_dist.objectives.base import Batch
from swift_dist.runs.files import write_whole

if TYPE_CHECKING:
    from swift_dist.engines.hf.engine import HFEngine

log = logging.getLogger(__name__)

FOLDER = "reference"
_ROUNDS = 16
"""Micro-batches of a rank between two writes: what a kill loses."""
_OF_A_MODEL = ("config.json", "*.safetensors", "*.bin", "*.py")


class Precomputed:
    """Takes the place of a `Reference` in the engine.

    Args:
        job: the job.
        hf_config: the model's config.json.
        engine: whose model learns.
    """

    def __init__(self, job: JobConfig, hf_config: dict[str, Any], engine: HFEngine) -> None:
        self._job, self._hf_config, self._engine = job, hf_config, engine
        self._sums = torch.empty(0, dtype=torch.float64)  # [sequences], on the CPU

    def beside(self, prepared: Prepared) -> Batch:
        """The micro-batch's `batch` with `reference_sums`."""
        assert prepared.numbers is not None
        is_real = prepared.numbers >= 0
        sums = torch.zeros(len(is_real), dtype=torch.float64)
        sums[is_real] = self._sums[prepared.numbers[is_real]]
        assert not sums.isnan().any(), "a sample that the pass left out"
        return replace(prepared.batch, reference_sums=sums.to(self._engine.device))

    def prepare(self, data: SampleData, show: Callable[[float], None]) -> bool:
        """Compute what is not known yet. Collective. See `HFEngine.prepare`.

        Raises:
            RunError: the reference gives a log-probability that is not finite, or the disk is full.
        """
        files = _Files(self._engine.worker.run_dir / FOLDER, data) if self._engine.worker.rank == 0 else None
        sums = np.empty(data.num_sequences)
        if files is not None:
            sums = files.open(_identity(self._job, self._hf_config))
        self._sums = self._from_rank_0(sums)
        eval_batches = self._job.train.eval_steps if self._job.train.eval_interval else 0
        steps = range(self._engine.steps, max(self._engine.steps, self._job.train.steps or 0))
        used = data.numbers_used(steps, eval_batches)
        known = self._sums.numpy().reshape(-1, data.sequences_per_sample)
        missing = used[np.isnan(known[used // data.sequences_per_sample]).any(axis=1)]
        if not len(missing):
            return False
        log.info("the reference's log-probabilities of %d samples are computed; %d are known", *_counts(missing, used))
        reference = Reference(self._job, self._hf_config, self._engine)
        try:
            return self._pass(reference, data, missing, files, show)
        finally:
            del reference
            gc.collect()
            if self._engine.device.type == "cuda":
                torch.cuda.empty_cache()

    def _from_rank_0(self, sums: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(sums).to(self._engine.device)
        dist.broadcast(tensor, src=0)
        return tensor.cpu()

    def _pass(
        self,
        reference: Reference,
        data: SampleData,
        missing: np.ndarray,
        files: _Files | None,
        show: Callable[[float], None],
    ) -> bool:
        worker = self._engine.worker
        size = _ROUNDS * self._job.train.micro_batch_size * worker.world_size
        for start in range(0, len(missing), size):
            worker.beat("eval", self._engine.steps)
            numbers = missing[start : start + size]
            found, stop = self._computed(reference, data, numbers)
            first, end = int(numbers[0]), int(numbers[-1]) + data.sequences_per_sample
            places = (numbers[:, None] + np.arange(data.sequences_per_sample)).reshape(-1)
            self._sums[torch.from_numpy(places)] = found
            if files is not None:
                files.write(self._sums.numpy(), first, end)
            show(min(1.0, (start + size) / len(missing)))
            if stop and start + size < len(missing):
                return True
        return False

    def _computed(self, reference: Reference, data: SampleData, numbers: np.ndarray) -> tuple[torch.Tensor, bool]:
        """Sums [len(numbers) * sequences of a sample] of all ranks, and whether one was asked to stop."""
        engine, width = self._engine, data.sequences_per_sample
        found = torch.zeros(len(numbers) * width + 1, dtype=torch.float64)
        answers, mismatched = engine.prepared(data.batches_of(numbers.tolist()))
        for item in (*answers, *mismatched):
            assert item.numbers is not None
            logps = reference.logps(item).double()
            of_batch = weighted_sums(item.batch, logps).cpu()
            real = item.numbers >= 0
            these = item.numbers[real].numpy()
            places = np.searchsorted(numbers, these // width * width) * width + these % width
            found[torch.from_numpy(places)] = of_batch[real]
        found[-1] = float(engine.worker.stop_requested())
        on_device = found.to(engine.device)
        if engine.sharing is not None and engine.sharing.rank > 0:
            on_device[:-1] = 0
        dist.all_reduce(on_device)
        sums, stops = on_device.cpu().split([len(numbers) * width, 1])
        if not sums.isfinite().all():
            raise RunError(
                "the reference model gives log-probabilities that are not finite",
                "look at its weights and at train.precision",
            )
        return sums, bool(stops)


class _Files:
    """The numbers on disk, as rank 0 reads and writes them.

    Args:
        folder: made if it is not there; data: whose sequences they are of.
    """

    def __init__(self, folder: Path, data: SampleData) -> None:
        self._folder, self._data, self._paths = folder, data, [Path()]

    def open(self, model: str) -> np.ndarray:
        """float64 [sequences], NaN where nothing is known. Files of other data and other models are removed.

        Args:
            model: identity of what computes.

        Raises:
            RunError: they cannot be read or made.
        """
        names = self._data.store_identities()  # the same rows may be there twice, to train and to evaluate on
        self._paths = [self._folder / f"{model}-{n}-{names[:place].count(n)}.bin" for place, n in enumerate(names)]
        parts = []
        with _told(self._folder):
            self._folder.mkdir(exist_ok=True)
            for other in set(self._folder.iterdir()) - set(self._paths):
                other.unlink()
            for path, start, end in self._spans():
                if not path.exists() or path.stat().st_size != 8 * (end - start):
                    write_whole(path, np.full(end - start, np.nan).tobytes())
                parts.append(np.fromfile(path))
        return np.concatenate(parts)

    def write(self, sums: np.ndarray, first: int, end: int) -> None:
        """Put sequences `first` ... `end` - 1 on disk.

        Raises:
            RunError: that cannot be done.
        """
        for path, start, stop in self._spans():
            low, high = max(first, start), min(end, stop)
            if low >= high:
                continue
            with _told(path), path.open("r+b") as file:
                file.seek(8 * (low - start))
                file.write(sums[low:high].tobytes())
                file.flush()
                os.fsync(file.fileno())

    def _spans(self) -> Sequence[tuple[Path, int, int]]:
        """(file, number of its first sequence, one more than that of its last)."""
        starts = self._data.first_numbers
        return list(zip(self._paths, starts[:-1], starts[1:], strict=True))


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """An error of the disk as one of the run."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error}", "free space, then run the command again") from error


def _identity(job: JobConfig, hf_config: dict[str, Any]) -> str:
    """Of what computes: the reference's weights and code by content, and what the job says of how they are loaded."""
    facts: dict[str, Any] = {"precision": job.train.precision, "tuner": job.tuner.model_dump(mode="json")}
    path = source(job)
    if path is None:
        facts |= {"config": hf_config, "seed": job.train.seed}
    else:
        folder = model_folder(path, weights=True)
        found = sorted({file for pattern in _OF_A_MODEL for file in folder.glob(pattern)})
        facts["files"] = {file.name: checksum(file) for file in found}
    return xxhash.xxh3_128(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _counts(missing: np.ndarray, used: np.ndarray) -> tuple[int, int]:
    return len(missing), len(used) - len(missing)
