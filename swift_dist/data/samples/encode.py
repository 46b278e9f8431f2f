"""Rows to stores of samples: the page to read first. Each step has its file.

rows/source.py    what data.train names, cut into units that worker processes can read on their own
identity.py       the name of a source's store, from everything that decides its content
store_lock.py     one process makes a store; another that wants the same one waits for it
unit_encoder.py   a unit: rows -> template -> truncation.py -> part file
merge.py          part files -> store
"""

from __future__ import annotations

import io
import logging
import os
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from swift_dist.config.finetune import TemplateSection
from swift_dist.config.job import JobConfig
from swift_dist.config.section import updated
from swift_dist.data.readers import BadRow
from swift_dist.data.rows.base import BadRowError, Row
from swift_dist.data.samples.dataset import require_sound
from swift_dist.data.samples.identity import content_key, tokenizer_hash
from swift_dist.data.samples.merge import merge
from swift_dist.data.samples.store import (
    BAD_ROWS,
    DamagedStoreError,
    SampleKind,
    SampleStore,
    listed_unusable,
    refuse_bad_rows,
)
from swift_dist.data.samples.store_lock import StoreLock
from swift_dist.data.samples.unit_encoder import Recipe, UnitFacts, UnitId, part_name, read_part, require_fitting
from swift_dist.errors import JobError, RunError, listed
from swift_dist.workers.pool import from_queue, run_all, start_local
from swift_dist.workers.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """The samples of one source: `store` is the name of their store, `key` the job's key that names the source."""

    key: str
    source: Any
    store: str


@dataclass(frozen=True)
class Named:
    """The sources of a key, and what their rows are encoded with."""

    wanted: list[Wanted]
    tokenizer: str
    template: TemplateSection


def named_sources(job: JobConfig, kind: SampleKind, key: str) -> Named:
    """Open data.train or data.validation, and name the samples of each source by content.

    Raises:
        JobError: see `encode_samples`.
    """
    from swift_dist.data.rows.source import open_sources

    require_sound(job, kind)
    path = job.model.tokenizer or job.model.path
    if path is None:
        raise JobError("model.tokenizer", "is not given", "give model.tokenizer, or model.path with a tokenizer")
    entries = {"data.train": job.data.train, "data.validation": job.data.validation}[key]
    if not entries:
        raise JobError(key, "no dataset given", f"give {key}: [ROWS.jsonl, ...]")
    # One date for all workers, and for all samples of a store.
    template = job.template if job.template.date else updated(job.template, date=date.today().isoformat())
    assert template.date
    tokenizer = tokenizer_hash(path, job.model.trust_remote_code, template.date)
    wanted = [
        Wanted(key, source, content_key(source, tokenizer, template, job.data.sequence_length, kind))
        for source in open_sources(entries, job.data, key)
    ]
    return Named(wanted, str(path), template)


def check_first_rows(job: JobConfig, kind: SampleKind, key: str) -> None:
    """What can be said of data.train or data.validation without encoding it: files that are here are looked into.

    Raises:
        JobError: as `encode_samples` does: data.format is none, or the first rows of a file are nothing for the job.
    """
    from swift_dist.data.rows.paths import is_here
    from swift_dist.data.rows.source import check_columns, first_rows, open_sources

    require_sound(job, kind)
    entries = {"data.train": job.data.train, "data.validation": job.data.validation}[key]
    here = tuple(entry for entry in entries if is_here(entry.path, key))
    check_columns(job.data)
    if job.data.columns and len(here) < len(entries):
        return  # whether one of the datasets has these columns only all of them can tell
    for source in open_sources(here, job.data, key):
        reasons = []
        for where, row in first_rows(source):
            reason = _unfit(row, kind)
            if reason is None:
                break
            reasons.append(f"{where}: {reason}")
        else:
            raise _no_sample(key, f"{source.name} gives no sample: of its first rows none can be used", reasons)


def _unfit(row: Row | BadRow, kind: SampleKind) -> str | None:
    if isinstance(row, BadRow):
        return row.reason
    try:
        require_fitting(row, kind)
    except BadRowError as error:
        return str(error)
    return None


def _no_sample(key: str, what: str, reasons: Iterable[str]) -> JobError:
    return JobError(
        key,
        f"{what}\n  {listed(reasons)}",
        "correct the rows, or look at data.format, data.columns, template.truncation and data.sequence_length",
    )


def encode_samples(
    job: JobConfig, kind: SampleKind, cache: Path, progress: bool = True, *, key: str = "data.train"
) -> list[SampleStore]:
    """Encode the rows of data.train or data.validation, or find them encoded; the same whatever data.workers is.

    Rows that give no sample are left out, counted and listed in the store (`SampleStore.bad_rows`). Those of them that
    cannot be used end the job where ``data.bad_rows: stop``; those that are sound, but longer than data.sequence_length
    or without a token that learns, do not.

    Args:
        kind: what a sample is: `Objective.sample`, or "classification", "token_classification".
        cache: folder of stores, named by content: shared by runs, and safe to remove while none is starting.
        progress: show how far it is, on stderr.
        key: "data.train" or "data.validation".

    Returns:
        One store a source, in the job's order, its files checked by checksum.

    Raises:
        JobError: no data, rows that the job does not take, a tokenizer that is none.
        RunError: a worker process died; the disk is full.
    """
    named = named_sources(job, kind, key)
    missing = {item.store: item for item in named.wanted if _open(cache / item.store) is None}
    if missing:
        _make(job, kind, cache, named, [missing[store] for store in sorted(missing)], progress)
    stores = []
    for item in named.wanted:
        source = item.source
        stores.append(SampleStore(cache.absolute() / item.store, source.name, source.weight, source.epochs))
        logger.info("%s", stores[-1].summary())
        paths = source_paths(source)
        refuse_bad_rows(stores[-1], job.data.bad_rows, key, paths)
        if number := stores[-1].facts["unusable"]:
            listing, first = stores[-1].path / BAD_ROWS, listed_unusable(stores[-1], paths)
            logger.warning("%s: left out %d that cannot be used (%s)\n  %s", source.name, number, listing, first)
    return stores


def source_paths(source: Any) -> list[str]:
    """The files of a RowSource."""
    return [file.path for file in source.files]


def _open(path: Path) -> SampleStore | None:
    """The store, if it is there and unharmed."""
    if not path.is_dir():
        return None
    try:
        return SampleStore(path, verify=True)
    except DamagedStoreError as error:
        logger.warning("%s: its rows are encoded again", error)
        return None


def _make(
    job: JobConfig, kind: SampleKind, cache: Path, named: Named, missing: Sequence[Wanted], progress: bool
) -> None:
    """Make stores; in the order of their names, so that two runs never wait for each other."""
    with ExitStack() as stack:
        locked = [(item, stack.enter_context(StoreLock(cache, item.store))) for item in missing]
        todo = [(item, lock) for item, lock in locked if _open(lock.target) is None]  # else another run made it
        if not todo:
            return
        for _, lock in todo:
            lock.parts.mkdir(parents=True, exist_ok=True)
        recipe = Recipe(
            sources=tuple(item.source for item, _ in todo),
            units=tuple(tuple(item.source.units()) for item, _ in todo),
            tokenizer=named.tokenizer,
            template=named.template,
            trust_remote_code=job.model.trust_remote_code,
            sequence_length=job.data.sequence_length,
            kind=kind,
            parts=tuple(str(lock.parts.absolute()) for _, lock in todo),
        )
        try:
            _run_workers(recipe, job.data.workers, progress)
            for (item, lock), units in zip(todo, recipe.units, strict=True):
                _publish(item, lock, len(units), recipe)
        except OSError as error:
            raise RunError(str(error), "repeat the command: it goes on where it was") from error


def _run_workers(recipe: Recipe, workers: int | None, progress: bool) -> None:
    """Make every part file that is not there yet."""
    todo = [
        UnitId(source, unit)
        for source, units in enumerate(recipe.units)
        for unit in range(len(units))
        if not _is_whole(Path(recipe.parts[source]) / part_name(unit))
    ]
    if not todo:
        return
    total = sum(recipe.units[unit.source][unit.unit].input_bytes for unit in todo)
    with Progress("encode rows", total, stream=None if progress else io.StringIO()) as shown:

        def seen(facts: UnitFacts | None) -> None:
            if facts is None:
                shown.add()
            else:
                shown.add(facts.input_bytes, tokens=facts.tokens)

        count = min(workers or len(os.sched_getaffinity(0)), len(todo))
        run_all(from_queue(todo), start_local(recipe, count), seen)


def _is_whole(part: Path) -> bool:
    if not part.exists():
        return False
    try:
        read_part(part)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        logger.warning("%s is not whole: it is made again", part)
        part.unlink()
        return False
    return True


def _publish(item: Wanted, lock: StoreLock, num_units: int, recipe: Recipe) -> None:
    folder, name = lock.new_folder(), item.source.name
    parts = [lock.parts / part_name(unit) for unit in range(num_units)]
    facts: dict[str, Any] = {"kind": recipe.kind, "sequence_length": recipe.sequence_length, "key": item.key}
    try:
        merge(parts, folder, **facts, name=name, paths=source_paths(item.source))
        store = SampleStore(folder, name)
        if store.num_samples == 0:
            what = f"{name} gives no sample: {store.facts['rows']} rows, none that can be used"
            raise _no_sample(item.key, what, [f"{row['row']}: {row['reason']}" for row in store.bad_rows()])
    except JobError:
        lock.discard()  # nothing of it would be of use to another job
        raise
    lock.publish(folder)
