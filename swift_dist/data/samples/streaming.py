"""Rows encoded beside the training (data.streaming): the driver's part.

The sources are cut into chunks (`CHUNK_BYTES`). `open_stream` encodes the first one, so that what is wrong with all
rows is found before anything starts; `Encoding` goes on with the others, in the order in which training needs them,
while the ranks read them (`stream.py`). A chunk lies in data.cache by content: a run that starts again, and any other
run of the same rows, finds those that are there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from swift_dist.config.job import JobConfig
from swift_dist.data.mixture import SMALLEST_SHARE
from swift_dist.data.samples.chunk_encoder import ChunkFacts, ChunkTask, open_whole
from swift_dist.data.samples.dataset import require_sound
from swift_dist.data.samples.encode import named_sources
from swift_dist.data.samples.store import SampleKind, SampleStore, chosen_alone
from swift_dist.data.samples.store_lock import FileLock
from swift_dist.data.samples.stream import StreamPlan, check_chunk
from swift_dist.data.samples.stream_order import encoding_order
from swift_dist.data.samples.stream_status import StatusWriter
from swift_dist.data.samples.unit_encoder import Recipe, UnitId
from swift_dist.errors import JobError, RunError, listed
from swift_dist.workers.pool import from_queue, run_all, start_local

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
_NICENESS = 10
_TELL_SECONDS = 60.0
_OLD_SECONDS = 24 * 3600.0  # unfinished work of processes that were killed


def require_streamable(job: JobConfig) -> None:
    """What a job cannot ask for where its rows are not all known.

    Raises:
        JobError: names it.
    """
    whole = "is known only when all rows are encoded, and data.streaming trains before that"
    off = "or leave data.streaming out"
    if job.train.epochs is not None:
        raise JobError("train.epochs", f"how many steps they are {whole}", f"--train.steps N instead, {off}")
    if job.train.steps is None:
        missing = f"is not given, and how many steps the rows make {whole}"
        raise JobError("train.steps", missing, f"--train.steps N, {off}")
    if job.data.split_ratio:
        raise JobError("data.split_ratio", f"which rows it takes {whole}", f"give data.validation, {off}")
    if job.data.prefetch == 0:
        raise JobError("data.prefetch", "0, but streamed rows are waited for in the background", "--data.prefetch 1")
    if any(entry.epochs is not None for entry in job.data.train):
        raise JobError("data.train", f"what share epochs are {whole}", f"give weight instead, {off}")
    if job.objective.precompute_reference:
        raise JobError("objective.precompute_reference", f"which rows it goes over {whole}", f"leave it out, {off}")
    weights = [entry.weight for entry in job.data.train if entry.weight is not None]
    if weights and len(weights) < len(job.data.train):
        raise JobError("data.train", "some datasets have weight, which others have not", "give all one, or none")
    if weights and min(weights) / sum(weights) < SMALLEST_SHARE:
        raise JobError("data.train", f"weight {min(weights):g} is no sample beside the others", "raise it")


def open_stream(
    job: JobConfig, kind: SampleKind, cache: Path, run: str, vocab_size: int | None
) -> tuple[StreamPlan, Encoding]:
    """Plan the chunks of data.train, and encode the first one of each stream where it is not there.

    Args:
        kind: what a sample is; cache: folder of encoded rows, seen by all nodes.
        run: the run folder: whose ranks look for news of the encoding.
        vocab_size: tokens of the model.

    Returns:
        The plan; and what encodes the rest while it is entered.

    Raises:
        JobError: see `require_streamable` and `encode_samples`; no row can be used.
        RunError: a worker process died; the disk is full.
    """
    require_streamable(job)
    require_sound(job, kind)
    named = named_sources(job, kind, "data.train")
    sources = tuple(item.source for item in named.wanted)
    sizes = [_chunk_bytes(source) for source in sources]
    units = tuple(tuple(source.units(size)) for source, size in zip(sources, sizes, strict=True))
    names = [f"{item.store}.{size}" for item, size in zip(named.wanted, sizes, strict=True)]
    folders = tuple(str(cache.absolute() / name) for name in names)
    plan = StreamPlan(
        kind=kind,
        names=tuple(source.name for source in sources),
        folders=folders,
        counts=tuple(map(len, units)),
        weights=tuple(source.weight for source in sources if source.weight is not None and len(sources) > 1),
        status=str(cache.absolute() / f".encoding.{hashlib.sha256(run.encode()).hexdigest()[:16]}.json"),
        vocab_size=vocab_size,
    )
    recipe = Recipe(
        sources=sources,
        units=units,
        tokenizer=named.tokenizer,
        template=named.template,
        trust_remote_code=job.model.trust_remote_code,
        sequence_length=job.data.sequence_length,
        kind=kind,
        parts=folders,
    )
    encoding = Encoding(job, plan, recipe)
    for store in encoding.first_chunks():
        check_chunk(store, plan, job)
    return plan, encoding


def _chunk_bytes(source: Any) -> int:
    """Of input in a chunk of a RowSource: 1/1024 of it, from `CHUNK_BYTES` to 8 times as much: each is some files."""
    return min(max(sum(file.size for file in source.files) >> 10, CHUNK_BYTES), 8 * CHUNK_BYTES)


class Encoding:
    """Encodes the chunks of a plan in a background thread with worker processes, while it is entered.

    Whatever ends it is told to the ranks (`stream_status`). Of several runs that want the same chunks one at a time
    encodes; another goes on when that one ends.

    Args:
        job: its train.seed, data.workers and data.bad_rows are read.
    """

    def __init__(self, job: JobConfig, plan: StreamPlan, recipe: Recipe) -> None:
        self._job, self._plan = job, plan
        self._task = ChunkTask(recipe)
        self._streams = plan.streams(job.train.seed, lambda chunk: 0)
        self._status = StatusWriter(Path(plan.status))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="encode-rows", daemon=True)
        self._seen: list[ChunkFacts] = []
        self._told, self._warned = time.monotonic(), 0

    def first_chunks(self) -> list[SampleStore]:
        """Of each stream the first chunk that has samples, encoded now where none is.

        Raises:
            JobError: a stream has none.
        """
        return [self._first_chunk(stream.order(0).tolist()) for stream in self._streams]

    def _first_chunk(self, chunks: Sequence[int]) -> SampleStore:
        begin, count = 0, 1
        while begin < len(chunks):
            these = chunks[begin : begin + count]
            stores = [open_whole(self._plan.path(chunk)) for chunk in these]
            missing = [chunk for chunk, store in zip(these, stores, strict=True) if store is None]
            if missing:
                workers = min(count, self._num_workers())
                for folder in self._plan.folders:
                    Path(folder).mkdir(parents=True, exist_ok=True)
                run_all(from_queue(self._units(missing)), start_local(self._task, workers), lambda facts: None)
                stores = [open_whole(self._plan.path(chunk)) for chunk in these]
            for store in stores:
                if store is not None and store.num_samples:
                    return store
            begin, count = begin + count, 2 * count
        source, _ = self._plan.place(chunks[0])
        first = SampleStore(self._plan.path(chunks[0]), self._plan.names[source])
        reasons = listed(f"{row['row']}: {row['reason']}" for row in first.bad_rows())
        raise JobError(
            "data.train",
            f"{first.name} gives no sample\n  {reasons}",
            "correct the rows, or look at data.format, data.columns, template.truncation and data.sequence_length",
        )

    def _units(self, chunks: Sequence[int]) -> list[UnitId]:
        return [UnitId(*self._plan.place(chunk)) for chunk in chunks]

    def _num_workers(self) -> int:
        return self._job.data.workers or len(os.sched_getaffinity(0))

    def __enter__(self) -> Encoding:
        self._status.running()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        Path(self._plan.status).unlink(missing_ok=True)

    def _run(self) -> None:
        error: Exception | None = None
        os.nice(_NICENESS)  # of this thread alone (Linux), and of what it starts: the workers give way to the ranks
        try:
            with ExitStack() as stack:
                for folder in sorted(set(self._plan.folders)):  # by name: two runs never wait for each other
                    path = Path(folder)
                    stack.callback(FileLock(path.with_name(f".{path.name}.lock"), self._tick).close)
                    _remove_unfinished(path)
                units = self._units(encoding_order(self._streams, self._plan.weights))
                count = min(self._num_workers(), len(units))
                run_all(from_queue(units), start_local(self._task, count), self._note)
            logger.info("all rows are encoded: %s", self._summary())
        except _StoppedError:
            logger.info("the training ended before all rows were encoded: %s", self._summary())
        except Exception as caught:
            error = caught
            logger.error("encoding rows failed: %s", caught)
        try:
            self._status.ended(error)
        except OSError:
            logger.exception("ranks cannot be told how the encoding ended: they notice that nothing comes")

    def _tick(self) -> None:
        if self._stop.is_set():
            raise _StoppedError
        self._status.running()
        if time.monotonic() - self._told > _TELL_SECONDS:
            self._told = time.monotonic()
            logger.info("encoding rows: %s", self._summary())

    def _note(self, facts: ChunkFacts | None) -> None:
        self._tick()
        if facts is None:
            return
        self._seen.append(facts)
        name = self._plan.names[facts.id.source]
        if facts.unusable and self._job.data.bad_rows == "stop":
            raise JobError(
                "data.train",
                f"{facts.unusable} rows of {name} cannot be used\n  {facts.first_unusable}",
                "correct them, or data.bad_rows: skip leaves them out",
            )
        if facts.unusable and self._warned < 20:
            self._warned += 1
            logger.warning("%s: left out %d that cannot be used\n  %s", name, facts.unusable, facts.first_unusable)

    def _summary(self) -> str:
        left_out = sum((Counter(facts.left_out) for facts in self._seen), Counter[str]())
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        numbers = {what: sum(getattr(facts, what) for facts in self._seen) for what in ("rows", "samples", "tokens")}
        return chosen_alone(sum(facts.pairs for facts in self._seen)) + (
            f"{len(self._seen)} of {sum(self._plan.counts)} chunks, {numbers['rows']} rows"
            + (f" ({sum(left_out.values())} left out: {reasons})" if reasons else "")
            + f", {numbers['samples']} samples, {numbers['tokens']} tokens"
        )


class _StoppedError(RunError):
    """The training has ended."""

    def __init__(self) -> None:
        super().__init__("stopped")


def _remove_unfinished(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for work in folder.glob(".*"):
        if work.stat().st_mtime < time.time() - _OLD_SECONDS:
            shutil.rmtree(work, ignore_errors=True)
