"""`swift-dist data preview`: rows as the model will see them, token by token, with what learns and how much."""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from pydantic import Field

from swift_dist.config.finetune import TemplateSection
from swift_dist.config.section import Section
from swift_dist.errors import JobError

if TYPE_CHECKING:
    from swift_dist.data.rows import Row
    from swift_dist.data.templates import Encoded
    from swift_dist.data.templates.template import Template

_MOST_BYTES = 8  # tokens that may together make one character
_REASONS = 10
ALIASES = {"max_length": "sequence_length"}  # as of a job


class PreviewOptions(Section):
    input: tuple[str, ...] = Field(min_length=1, description="files, folders or hub ids of rows, as data.train")
    tokenizer: str = Field(description="the model's folder or id: its tokenizer and its chat template")
    rows: int = Field(3, ge=0, description="rows to show")
    count: int = Field(1000, gt=0, description="rows to encode and count, the shown ones included")
    format: str = Field("auto", description="their format, a file of swift_dist/data/rows (auto: by their columns)")
    columns: dict[str, str] = Field({}, description="{name that a format knows: name in the file}")
    sequence_length: int | None = Field(
        None, gt=1, description="show what template.truncation makes of longer rows (default: rows as long as they are)"
    )
    template: TemplateSection = TemplateSection()
    trust_remote_code: bool = Field(False, description="let the tokenizer run code that lies in its folder")


def preview(options: PreviewOptions) -> dict[str, Any]:
    """Encode the first rows.

    Returns:
        rows: how many were read; formats and kinds: how many of each; sequences: how many were encoded; apart: rows
        that were taken apart into several (`Template.encode_all`), and into how many; reasons: why rows, or sequences
        of theirs, were left out, and how often; first: of each reason the first such row; lengths: tokens of the
        sequences (min, median, p95, max, mean); learned: share of all tokens with a weight; shown: of each row its
        origin, kind and sequences (name, tokens, learned, pieces: [text, weight of its loss]).

    Raises:
        JobError: rows or tokenizer are missing, or the chat template gives no exact mask.
    """
    from swift_dist.data.rows import BadRowError, Row
    from swift_dist.data.templates.template import load_template

    if options.sequence_length is None and options.template.truncation != "delete":
        raise JobError(
            "template.truncation", "has no effect on rows of any length", "give --sequence_length, or leave it out"
        )
    template = load_template(options.tokenizer, options.template, options.trust_remote_code)
    found = _Found()
    for form, origin, row in islice(_rows(options), options.count):
        found.formats[form] += 1
        if not isinstance(row, Row):
            found.leave_out(row.reason, origin)
            continue
        kind = kind_of(row)
        found.kinds[kind] += 1
        if row.messages and found.kinds[kind] == 1:
            template.check()
        try:
            whole = _encoded(template, row)
            sequences, left_out = _shortened(whole, kind, options)
        except BadRowError as error:
            found.leave_out(str(error), origin)
            continue
        if kind == "conversation" and len(whole) > 1:
            found.apart.update(rows=1, sequences=len(whole))
        for reason in left_out:
            found.leave_out(reason, origin)
        found.lengths += [len(encoded) for _, encoded in sequences]
        found.learned += sum(int((encoded.weights > 0).sum()) for _, encoded in sequences)
        if len(found.shown) < options.rows:
            shown = [_shown(template, *one) for one in sequences]
            found.shown.append({"origin": origin, "kind": kind, "sequences": shown})
    return found.result()


@dataclass
class _Found:
    """What `preview` counts; see there."""

    formats: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    apart: Counter[str] = field(default_factory=lambda: Counter(rows=0, sequences=0))
    lengths: list[int] = field(default_factory=list)
    learned: int = 0
    shown: list[dict[str, Any]] = field(default_factory=list)

    def leave_out(self, reason: str, origin: str) -> None:
        self.reasons[reason] += 1
        self.first.setdefault(reason, origin)

    def result(self) -> dict[str, Any]:
        return {
            "rows": sum(self.formats.values()),
            "formats": dict(self.formats),
            "kinds": dict(self.kinds),
            "sequences": len(self.lengths),
            "apart": dict(self.apart),
            "reasons": dict(self.reasons.most_common()),
            "first": self.first,
            "lengths": _distribution(self.lengths),
            "learned": self.learned / sum(self.lengths) if self.lengths else 0.0,
            "shown": self.shown,
        }


def kind_of(row: Row) -> str:
    if row.rejected:
        return "pair"
    if row.num_answer:
        return "judged answer"
    if row.label is not None:
        return "classified"
    return "text" if row.text is not None else "conversation"


def _rows(options: PreviewOptions) -> Iterator[tuple[str, str, Any]]:
    """(format, origin, row) of each."""
    from swift_dist.config.job import DataSection, DatasetEntry
    from swift_dist.data.rows.source import open_sources, read_rows

    entries = tuple(DatasetEntry(path=path) for path in options.input)
    section = DataSection(train=entries, format=options.format, columns=options.columns)
    for source in open_sources(entries, section, "data.train"):
        for unit in source.units():
            for origin, row in read_rows(source, unit):
                yield source.format, origin, row


def _encoded(template: Template, row: Row) -> list[tuple[str, Encoded]]:
    if row.rejected:
        return list(zip(("chosen", "rejected"), template.encode_pair(row), strict=True))
    sequences = template.encode_all(row)
    return [(f"{k + 1} of {len(sequences)}" if len(sequences) > 1 else "", one) for k, one in enumerate(sequences)]


def _shortened(
    sequences: list[tuple[str, Encoded]], kind: str, options: PreviewOptions
) -> tuple[list[tuple[str, Encoded]], list[str]]:
    """What `template.truncation` makes of them, and why sequences of a row that others are left of are left out.

    Raises:
        LeftOutError: nothing is left of the row.
    """
    from swift_dist.data.samples import truncation

    limit, how = options.sequence_length, options.template.truncation
    if limit is None:
        return sequences, []
    if kind == "pair":
        cut = truncation.pair(sequences[0][1], sequences[1][1], limit, how).sequences
        return list(zip(("chosen", "rejected"), cut, strict=True)), []
    whole = sequences[0][1]
    if kind == "judged answer":
        return [("", truncation.judged_answer(whole, limit, how))], []
    if kind == "classified":
        labels = [0] * int((whole.weights > 0).sum())
        return [("", truncation.classified(whole, labels or 0, limit, how).sequences[0])], []
    short: list[tuple[str, Encoded]] = []
    left_out: list[truncation.LeftOutError] = []
    for name, whole in sequences:
        try:
            samples = truncation.single(whole, limit, how)
        except truncation.LeftOutError as error:
            left_out.append(error)
            continue
        pieces = [f"piece {k + 1}" for k in range(len(samples))] if len(samples) > 1 else [""]
        names = [", ".join(filter(None, (name, piece))) for piece in pieces]
        short += [(name, sample.sequences[0]) for name, sample in zip(names, samples, strict=True)]
    if not short:
        raise left_out[-1]
    return short, [f"one sequence of several of its row: {error}" for error in left_out]


def _shown(template: Template, name: str, encoded: Encoded) -> dict[str, Any]:
    learned = int((encoded.weights > 0).sum())
    return {"name": name, "tokens": len(encoded), "learned": learned, "pieces": token_texts(template, encoded)}


def token_texts(template: Template, encoded: Encoded) -> list[tuple[str, float]]:
    """The text and the weight of each token; tokens that only together make a character are one."""
    decode = template.tokenizer.decode
    pieces: list[tuple[str, float]] = []
    before: list[int] = []
    held: list[int] = []
    for token, weight in zip(encoded.ids.tolist(), encoded.weights.tolist(), strict=True):
        held.append(token)
        # Some tokenizers write a word's space only where something stands before it.
        start = len(decode(before, clean_up_tokenization_spaces=False)) if before else 0
        text = decode(before + held, clean_up_tokenization_spaces=False)[start:]
        if text.endswith("\ufffd") and len(held) < _MOST_BYTES:
            continue
        pieces.append((text, weight))
        before, held = held, []
    if held:
        pieces.append((decode(held), float(encoded.weights[-1])))
    return pieces


def _distribution(lengths: Sequence[int]) -> dict[str, float]:
    import numpy as np

    if not lengths:
        return {}
    middle, high = np.percentile(lengths, [50, 95])
    mean = float(np.mean(lengths))
    return {"min": min(lengths), "median": float(middle), "p95": float(high), "max": max(lengths), "mean": mean}


def render(result: dict[str, Any]) -> str:
    """Rows and counts: in colours on a terminal, else with ⟦ ⟧ around what learns (⟦2: ⟧ where the weight is 2)."""
    from rich.console import Console
    from rich.text import Text

    colours = sys.stdout.isatty()
    console = Console(file=io.StringIO(), force_terminal=colours, highlight=False, soft_wrap=True)
    for row in result["shown"]:
        for sequence in row["sequences"]:
            head = " ".join(filter(None, (row["origin"], row["kind"], sequence["name"])))
            console.print(Text(f"{head}: {sequence['tokens']} tokens, {sequence['learned']} learn", style="bold"))
            console.print(_coloured(sequence["pieces"]) if colours else Text(marked(sequence["pieces"])))
            console.print()
    for line in _counts(result):
        console.print(Text(line))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().rstrip("\n")


def marked(pieces: Sequence[tuple[str, float]]) -> str:
    """The text with ⟦ ⟧ around tokens of one weight other than 0."""
    text, last = "", 0.0
    for piece, weight in pieces:
        if weight != last:
            text += ("⟧" if last else "") + (f"⟦{'' if weight == 1 else f'{weight:g}: '}" if weight else "")
            last = weight
        text += piece
    return text + ("⟧" if last else "")


def _coloured(pieces: Sequence[tuple[str, float]]) -> Any:
    """Given tokens are dim, learned ones green, those of another weight than 1 yellow; every other is underlined."""
    from rich.text import Text

    text = Text()
    for number, (piece, weight) in enumerate(pieces):
        colour = "dim" if not weight else "green" if weight == 1 else "yellow"
        text.append(piece.replace("\n", "⏎\n"), style=f"{colour} underline" if number % 2 else colour)
    return text


def _counts(result: dict[str, Any]) -> Iterator[str]:
    def listed(counts: dict[str, int]) -> str:
        return ", ".join(f"{name} {number:,}" for name, number in counts.items())

    yield f"{result['rows']:,} rows: {listed(result['formats'])}" + (
        f" ({listed(result['kinds'])})" if result["kinds"] else ""
    )
    if result["lengths"]:
        spread = ", ".join(f"{name} {value:,.0f}" for name, value in result["lengths"].items())
        yield f"{result['sequences']:,} sequences, tokens: {spread}; {result['learned']:.0%} of all tokens learn"
    if result["apart"]["rows"]:
        rows, sequences = result["apart"]["rows"], result["apart"]["sequences"]
        yield (
            f"{rows:,} rows were taken apart into {sequences:,} sequences: the chat template rewrites earlier turns "
            "(template.rewritten_turns)"
        )
    left_out = sum(result["reasons"].values())
    if left_out:
        yield f"{left_out:,} are left out:"
    for reason, number in list(result["reasons"].items())[:_REASONS]:
        at = result["first"][reason]
        yield f"  {number:,}: {reason} ({at if number == 1 else f'first {at}'})"
    if len(result["reasons"]) > _REASONS:
        yield f"  and {len(result['reasons']) - _REASONS} more reasons"
