"""The work on one unit of a source: read its rows, encode them, write a part file. Runs inside a worker process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from swift_dist.config.finetune import TemplateSection
from swift_dist.data.readers import BadRow
from swift_dist.data.rows.base import BadRowError, Row
from swift_dist.data.samples import truncation
from swift_dist.data.samples.store import SampleKind
from swift_dist.data.samples.truncation import LeftOutError, Sample
from swift_dist.data.templates.base import Encoded

_LISTED = 1000  # bad rows of one unit whose reason is kept; the others are counted


@dataclass(frozen=True)
class UnitId:
    """Unit number `unit` of source number `source` of the recipe."""

    source: int
    unit: int


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a unit's part file holds, and where it goes: the task of the workers.

    Args:
        sources: RowSource of each source; units: of each source, the units it is read in.
        tokenizer: folder or id; template, trust_remote_code: how rows become tokens.
        sequence_length: L; kind: what a sample is.
        parts: folder of each source's part files.
    """

    sources: tuple[Any, ...]
    units: tuple[tuple[Any, ...], ...]
    tokenizer: str
    template: TemplateSection
    trust_remote_code: bool
    sequence_length: int
    kind: SampleKind
    parts: tuple[str, ...]

    def start(self) -> Callable[[UnitId], UnitFacts]:
        return self.encoder().encode

    def encoder(self) -> UnitEncoder:
        from swift_dist.data.rows.source import read_rows
        from swift_dist.data.templates.template import load_template

        template = load_template(self.tokenizer, self.template, self.trust_remote_code)
        return UnitEncoder(self, template, read_rows)


@dataclass(frozen=True)
class UnitFacts:
    """What the driver hears of a finished unit."""

    id: UnitId
    tokens: int
    input_bytes: int


@dataclass
class _Arrays:
    """The part file of one unit while it grows."""

    ids: list[np.ndarray] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    labels: list[float] = field(default_factory=list)
    num_labels: list[int] = field(default_factory=list)
    label_kinds: set[str] = field(default_factory=set)
    labels_are_float: bool = False
    bad: list[dict[str, str]] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    unusable: int = 0
    rows: int = 0
    pairs: int = 0  # rows of which the chosen answer is learnt, and the rejected one is not read
    apart: dict[str, int] = field(default_factory=lambda: {"rows": 0, "sequences": 0, "left_out": 0})

    def add(self, sample: Sample, content: int) -> None:
        self.ids += [sequence.ids for sequence in sample.sequences]
        self.weights += [sequence.weights for sequence in sample.sequences]
        self.hashes.append(content)
        label = sample.label
        if label is None:
            self.label_kinds.add("none")
            return
        self.label_kinds.add("list" if isinstance(label, Sequence) else "scalar")
        values = list(label) if isinstance(label, Sequence) else [label]
        self.labels_are_float |= any(isinstance(value, float) for value in values)
        self.labels += [float(value) for value in values]
        self.num_labels.append(len(values))

    def leave_out(self, where: str, error: BadRowError) -> None:
        reason = str(error)
        known = isinstance(error, LeftOutError)
        short = reason.split(" (")[0].split(":")[0] if known else "unusable"
        self.reasons[short] = self.reasons.get(short, 0) + 1
        self.unusable += not known
        self._list(where, reason, "left out" if known else "unusable")

    def take_apart(self, where: str, number: int, left_out: Sequence[tuple[int, LeftOutError]]) -> None:
        """Note a row that gave `number` sequences (`Template.encode_all`), of which some are left out."""
        self.apart["rows"] += 1
        self.apart["sequences"] += number
        self.apart["left_out"] += len(left_out)
        for which, error in left_out:
            self._list(where, f"sequence {which} of its {number}: {error}", "left out")

    def _list(self, where: str, reason: str, kind: str) -> None:
        if len(self.bad) < _LISTED:
            self.bad.append({"row": where, "reason": reason, "kind": kind})


class UnitEncoder:
    """Encodes units of one recipe.

    Args:
        template: a `Template`; read_rows: of `rows.source`.
    """

    def __init__(self, recipe: Recipe, template: Any, read_rows: Callable[[Any, Any], Iterator]) -> None:
        self.recipe, self._template, self._read_rows = recipe, template, read_rows
        self._needs_check = recipe.kind not in ("classification", "token_classification")  # there no mask is needed

    def encode(self, unit: UnitId) -> UnitFacts:
        """Write the part file of a unit; raises as `write` does."""
        tokens = self.write(unit, Path(self.recipe.parts[unit.source]) / part_name(unit.unit))
        return UnitFacts(unit, tokens, self.recipe.units[unit.source][unit.unit].input_bytes)

    def write(self, unit: UnitId, path: Path) -> int:
        """Write the part file of a unit to `path`; returns its tokens.

        Raises:
            JobError: rows are conversations, and the chat template gives no exact masks.
            OSError: it cannot be read or written.
        """
        arrays = _Arrays()
        if self.recipe.kind == "kto":
            self._judged(unit, arrays)
        else:
            for where, row in self._rows(unit, arrays):
                try:
                    samples, content = self._samples(where, row, arrays)
                except BadRowError as error:
                    arrays.leave_out(where, error)
                    continue
                for sample in samples:
                    arrays.add(sample, content)
        write_part(path, arrays)
        return sum(map(len, arrays.ids))

    def _samples(self, where: str, row: Row, arrays: _Arrays) -> tuple[list[Sample], int]:
        """A row's samples and the hash of its content."""
        limit, how, template = self.recipe.sequence_length, self.recipe.template.truncation, self._template
        kind = self.recipe.kind
        require_fitting(row, kind)
        if kind == "pair":
            chosen, rejected = template.encode_pair(row)
            return [truncation.pair(chosen, rejected, limit, how)], content_hash(chosen.ids, rejected.ids)
        if kind == "token_classification":
            whole = template.encode_words(row)
            return [truncation.classified_words(whole, row.label, limit, how)], content_hash(whole.ids)
        if kind == "classification":
            # encode() would take a text with as many labels as words for one whose words are classified.
            whole = template.encode_text(row.text) if row.text is not None else template.encode(row)
            whole = Encoded(whole.ids, np.zeros_like(whole.weights))
            return [truncation.classified(whole, row.label, limit, how)], content_hash(whole.ids)
        sequences = template.encode_all(row)
        samples: list[Sample] = []
        left_out: list[tuple[int, LeftOutError]] = []
        for number, whole in enumerate(sequences, 1):
            try:
                samples += truncation.single(whole, limit, how)
            except LeftOutError as error:
                left_out.append((number, error))
        if not samples:
            raise left_out[-1][1]
        arrays.pairs += bool(row.rejected)
        if len(sequences) > 1:
            arrays.take_apart(where, len(sequences), left_out)
        return samples, content_hash(*(whole.ids for whole in sequences))

    def _rows(self, unit: UnitId, arrays: _Arrays | None) -> Iterator[tuple[str, Row]]:
        """Rows of a unit; those that are none are noted in `arrays`, where it is given."""
        source = self.recipe.sources[unit.source]
        for where, row in self._read_rows(source, self.recipe.units[unit.source][unit.unit]):
            if arrays is not None:
                arrays.rows += 1
            if not isinstance(row, BadRow):
                if self._needs_check and row.text is None:
                    self._template.check()
                    self._needs_check = False
                yield where, row
            elif arrays is not None:
                arrays.leave_out(where, BadRowError(row.reason))

    def _judged(self, unit: UnitId, arrays: _Arrays) -> None:
        """KTO: each answer beside the next good row's, across the ends of units and from the last row to the first."""
        waiting: tuple[str, Row, Any] | None = None
        for found in self._good_answers(unit, arrays):
            if waiting is not None:
                self._mismatch(waiting, found[1], arrays)
            waiting = found
        if waiting is not None:
            number = len(self.recipe.units[unit.source])
            later = (UnitId(unit.source, (unit.unit + k) % number) for k in range(1, number + 1))
            # The search ends at the latest with this unit's own first good row.
            where, answer, _ = next(found for other in later for found in self._good_answers(other, None))
            if where == waiting[0]:
                # Only itself: with its own answer the divergence would be measured on what is trained.
                arrays.leave_out(waiting[0], BadRowError("no other row has an answer to put in the place of its own"))
            else:
                self._mismatch(waiting, answer, arrays)

    def _good_answers(self, unit: UnitId, arrays: _Arrays | None) -> Iterator[tuple[str, Row, Any]]:
        """Rows whose own answer can be trained on."""
        limit, how = self.recipe.sequence_length, self.recipe.template.truncation
        for where, row in self._rows(unit, arrays):
            try:
                require_fitting(row, "kto")
                own = self._template.encode(row)
                truncation.judged_answer(own, limit, how)
            except BadRowError as error:
                if arrays is not None:
                    arrays.leave_out(where, error)
                continue
            yield where, row, own

    def _mismatch(self, waiting: tuple[str, Row, Any], answer: Row, arrays: _Arrays) -> None:
        where, row, own = waiting
        limit, how = self.recipe.sequence_length, self.recipe.template.truncation
        try:
            mismatched = self._template.encode_prompt_and(row, answer)
            sample = truncation.judged(own, mismatched, row.label, limit, how)
        except BadRowError as error:
            arrays.leave_out(where, error)
            return
        arrays.add(sample, content_hash(own.ids))


def require_fitting(row: Row, kind: SampleKind) -> None:
    """Raise BadRowError for a row that, however it is encoded, gives no sample of `kind`."""
    if kind == "pair":
        if not row.num_answer or not row.rejected:
            raise BadRowError("the row is no preference pair")
    elif kind == "kto":
        if not isinstance(row.label, (bool, int)):
            raise BadRowError("it has no label that says whether its answer is wanted")
    elif kind == "single":
        _require_wanted(row)
    elif row.label is None:
        raise BadRowError("it has no label")


def _require_wanted(row: Row) -> None:
    """Raise BadRowError for a row whose label says that there is nothing in it to imitate."""
    if row.label is None:
        return
    if not row.num_answer:
        raise BadRowError("it has a label to classify it by, not an answer to learn")
    if not row.label:
        raise BadRowError("its label says that its answer is not wanted: --rlhf_type kto learns from such rows")


def content_hash(*sequences: np.ndarray) -> int:
    """64 bits of the ids of whole sequences, before truncation."""
    import xxhash

    digest = xxhash.xxh3_64()
    for ids in sequences:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.astype("<i4").tobytes())
    return digest.intdigest()


def part_name(unit: int) -> str:
    return f"{unit:07d}.npz"


def write_part(path: Path, arrays: _Arrays) -> None:
    """Write a unit's samples under a name of its own and rename the file when it is whole."""
    lengths = np.array([len(ids) for ids in arrays.ids], dtype=np.int64)
    weights = np.concatenate(arrays.weights).astype(np.float32) if arrays.weights else np.empty(0, np.float32)
    plain = bool(((weights == 0) | (weights == 1)).all())
    header = {
        "rows": arrays.rows,
        "bad": arrays.bad,
        "reasons": arrays.reasons,
        "unusable": arrays.unusable,
        "pairs": arrays.pairs,
        "apart": arrays.apart,
        "label_kinds": sorted(arrays.label_kinds),
        "labels_are_float": arrays.labels_are_float,
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            np.savez(
                stream,
                tokens=np.concatenate(arrays.ids).astype(np.int32) if arrays.ids else np.empty(0, np.int32),
                weights=weights.astype(np.uint8) if plain else weights,
                lengths=lengths,
                hashes=np.array(arrays.hashes, dtype=np.uint64),
                labels=np.array(arrays.labels, dtype=np.float64),
                num_labels=np.array(arrays.num_labels, dtype=np.int64),
                header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
            )
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def read_part(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and header of a part file.

    Raises:
        ValueError, OSError, zipfile.BadZipFile: it is not whole.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, json.loads(bytes(arrays.pop("header")))
