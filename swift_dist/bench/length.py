"""`swift-dist bench length`: the longest trainable sequence of a model, by features and ranks that share it."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from swift_dist.config.finetune import AnyNames
from swift_dist.config.section import Section
from swift_dist.errors import JobError, RunError

if TYPE_CHECKING:
    from swift_dist.bench.plan import Series
    from swift_dist.bench.search import Try

log = logging.getLogger(__name__)


def _numbers(value: Any) -> Any:
    """One text, or each of a list, may hold several numbers: ``1,2,4``."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return tuple(part for item in items for part in (item.split(",") if isinstance(item, str) else [item]))


Sizes = Annotated[
    tuple[Annotated[int, Field(gt=0)], ...],
    BeforeValidator(_numbers, json_schema_input_type=str | tuple[int, ...]),
    Field(min_length=1),
]


class LengthOptions(Section):
    model: str | None = Field(
        None,
        description="folder (without weights in it they are random), hub id, or a recipe's model such as llama-3.1-8b",
    )
    job: str | None = Field(
        None,
        description="job file of swift-dist sft whose model, strategy, tuner, optimizer and precision are tried; its "
        "data, ranks, batch and steps are not read",
    )
    sequence_parallel_size: Sizes = Field((1,), description="ranks that share each sequence: one number or several")
    nproc_per_node: int | None = Field(
        None, gt=0, description="ranks, all on this machine (default: as many as share a sequence)"
    )
    memory: str | None = Field(
        None,
        description="what a rank may take, such as 80GiB. On a GPU: in torch's allocator, which fails beyond it "
        "(default: all there is). On a CPU: the peak resident size of its process; needed there",
    )
    features: AnyNames = Field(
        (),
        description="sets to try, each with all before it: base, recompute, tiled_loss, tiled_mlp, "
        "offload_activations (saves nothing on a CPU: there only by its name); all: the last of them (default: each)",
    )
    fsdp: Literal["fsdp2"] | None = Field(None, description="as of swift-dist sft")
    deepspeed: str | None = Field(None, description="as of swift-dist sft")
    tuner_type: AnyNames = Field((), description="as of swift-dist sft (default: full)")
    precision: Literal["fp32", "bf16", "fp16"] | None = Field(None, description="as of swift-dist sft (default: bf16)")
    accelerator: Literal["auto", "gpu", "cpu"] | None = Field(None, description="what ranks compute on (default: auto)")
    min_length: int = Field(1024, ge=8, description="tokens of the shortest sequence that is tried")
    max_length: int = Field(2**24, ge=8, description="tokens of the longest sequence that is tried")
    steps: int = Field(2, ge=2, description="optimizer steps of a try; the first one is not timed")
    timeout: float = Field(3600.0, gt=0, description="seconds of a try, beyond which its length counts as too long")
    output: str = Field("runs/length", description="folder of the tables; one that holds tries of the same goes on")
    dry_run: bool = Field(False, description="say what would be tried; start and write nothing")


def find_lengths(options: LengthOptions) -> dict[str, Any]:
    """Search the longest length of every number of ranks and set of features.

    Returns:
        ``rows``: ``sharing`` (ranks a sequence), ``ranks``, ``features``, ``longest`` (tokens, None: not even
        min_length fits), ``step_seconds`` and ``tokens_per_second`` at that length, ``peak_gib`` (of the largest rank),
        ``too_long`` (the shortest that did not fit), ``ended_by`` (memory, time or max_length) and ``reason``,
        ``tries`` and ``command`` (what trains so); what it was asked, ``left_out`` (features that the model does not
        take, and why) and ``versions``. See `report.py` for the files.

    Raises:
        JobError: the options, or one of the jobs.
        RunError: a try failed, not for want of memory; or not even the shortest length fits anywhere.
    """
    series = _series(options)
    if options.dry_run:
        return _planned(options, series)
    from swift_dist.bench.report import write_report

    folder = _folder(options.output)
    tries = Tries(folder / "tries.jsonl")
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for number, each in enumerate(series, start=1):
        try:
            row = _row(each, options, tries, folder, rows, left_out)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; the same command goes on with the tries in {folder}") from None
        rows += [] if row is None else [row]
        result = _result(options, series[0], rows, left_out, complete=number == len(series))
        write_report(folder, result)
    if all(row["longest"] is None for row in rows):
        raise RunError(
            f"not even {options.min_length:,} tokens fit into {options.memory or 'the GPU'}: {rows[-1]['reason']}",
            "more --memory (on a CPU a rank's libraries take about 0.4 GiB of it), more ranks with --fsdp fsdp2, "
            "a smaller --model, or a shorter --min_length",
        )
    return {**result, "output": str(folder)}


class Tries:
    """The tries made so far, one JSON line each: what was tried once is not tried again."""

    def __init__(self, path: Path) -> None:
        self._path, self._known = path, {}
        self._used: list[Try] = []
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # torn by a kill
                continue
            self._known[row["key"]] = row

    def find(self, key: str, timeout: float) -> Try | None:
        """None also where it had less time than `timeout` seconds, and that was too short."""
        from swift_dist.bench.search import Try

        row = self._known.get(key)
        if row is None or (row["timed_out"] and row["timeout"] < timeout):
            return None
        self._used.append(found := Try.of(row))
        return found

    def shortest(self) -> Try | None:
        """Of those made or found by this command, the shortest that fitted."""
        return min((t for t in self._used if t.fits and t.peak_bytes), key=lambda t: t.length, default=None)

    def add(self, series: Series, key: str, outcome: Try, timeout: float) -> None:
        from dataclasses import asdict

        row = {"key": key, "sharing": series.sharing, "features": series.features, **asdict(outcome)}
        row["timeout"] = timeout
        self._known[key] = row
        self._used.append(outcome)
        with self._path.open("ab+") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the line before was torn
                    file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")


def _series(options: LengthOptions) -> list[Series]:
    from swift_dist.bench.plan import base_job, chosen_features, make_series, parse_memory
    from swift_dist.cluster.devices import choose_devices, gpus_of_this_machine
    from swift_dist.config.section import updated
    from swift_dist.runs.manifest import versions

    memory = None if options.memory is None else parse_memory(options.memory)
    if options.max_length < options.min_length:
        raise JobError("max_length", f"{options.max_length} is below min_length {options.min_length}", "raise it")
    given = {
        "strategy.fsdp": options.fsdp,
        "strategy.deepspeed": options.deepspeed,
        "tuner.name": options.tuner_type or None,
        "train.precision": options.precision,
        "cluster.accelerator": options.accelerator,
        "cluster.nproc_per_node": options.nproc_per_node,
    }
    base = base_job(options.model, options.job, options.steps, {k: v for k, v in given.items() if v is not None})
    if options.nproc_per_node is None:
        base = updated(base, cluster=updated(base.cluster, nproc_per_node=None))
    ranks = options.nproc_per_node or max(options.sequence_parallel_size)
    devices = choose_devices(
        updated(base.cluster, nproc_per_node=ranks), gpus_of_this_machine(), "this machine", planning=options.dry_run
    )
    if not devices.use_gpu:
        _check_memory(memory, ranks)
    return make_series(
        base,
        sharing=options.sequence_parallel_size,
        features=chosen_features(options.features, devices.use_gpu),
        memory=memory,
        on_cuda=devices.use_gpu,
        length=options.min_length,
        versions=versions(),
    )


def _check_memory(memory: int | None, ranks: int) -> None:
    """On the CPU."""
    import psutil

    if memory is None:
        raise JobError("memory", "is not given, and on a CPU ranks have no memory of their own", "--memory 4GiB")
    here = psutil.virtual_memory().total
    if memory * ranks > here:
        raise JobError(
            "memory",
            f"{ranks} ranks of {memory / 2**30:g} GiB are more than the {here / 2**30:.1f} GiB of this machine",
            f"at most --memory {here // ranks // 2**20}MiB",
        )


def _folder(path: str) -> Path:
    """The output folder, which can be written to.

    Raises:
        JobError: it cannot.
    """
    folder = Path(path).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "tries.jsonl").open("ab"):
            pass
    except OSError as error:
        raise JobError("output", f"{folder} cannot be written: {error.strerror}", "another --output") from None
    return folder


def _guess(rows: Sequence[dict[str, Any]], series: Series) -> int | None:
    """The length to begin with: what fitted with one feature less, or so much longer as more ranks share it."""
    fitted = [row for row in rows if row["longest"]]
    same_ranks = [row["longest"] for row in fitted if row["sharing"] == series.sharing]
    same_set = [
        row["longest"] * series.sharing // row["sharing"] for row in fitted if row["features"] == series.features
    ]
    return max([*same_ranks, *same_set], default=None)


def _row(
    series: Series,
    options: LengthOptions,
    tries: Tries,
    folder: Path,
    rows: Sequence[dict[str, Any]],
    left_out: dict[str, str],
) -> dict[str, Any] | None:
    """One line of the table, less what the model does not take and nobody asked for by name (which is put into
    `left_out`); None: what is left of it is in the table already."""
    from swift_dist.bench.plan import FEATURES

    while True:
        series = series.without(left_out)
        if any((row["sharing"], row["features"]) == (series.sharing, series.features) for row in rows):
            return None
        try:
            return _search(series, options, tries, folder, _guess(rows, series))
        except JobError as error:
            name = error.key.removeprefix("train.")
            if name in (*options.features, *left_out) or name not in FEATURES:
                raise
            left_out[name] = error.message
            log.info("%s is left out: %s", name, error.message)


def _search(series: Series, options: LengthOptions, known: Tries, folder: Path, guess: int | None) -> dict[str, Any]:
    """Try lengths until the longest is known, or that none fits."""
    from swift_dist.bench.search import bracket, lengths_between, next_length
    from swift_dist.bench.trying import attempt

    lengths = lengths_between(options.min_length, options.max_length)
    tries: list[Try] = []
    shortest = known.shortest()
    while (length := next_length(lengths, tries, series.memory, guess, shortest)) is not None:
        key = series.key(length)
        outcome = known.find(key, options.timeout)
        if outcome is None:
            outcome = attempt(series, length, folder / "logs", options.timeout)
            known.add(series, key, outcome, options.timeout)
            log.info("%s", _progress(series, outcome))
        tries.append(outcome)
    best, failed = bracket(tries)
    return {
        "sharing": series.sharing,
        "ranks": series.num_ranks,
        "features": series.features,
        "longest": best.length if best else None,
        "step_seconds": best.step_seconds if best else None,
        "tokens_per_second": _tokens_per_second(series, best) if best else None,
        "peak_gib": round(best.peak_bytes / 2**30, 3) if best and best.peak_bytes else None,
        "too_long": failed.length if failed else None,
        "ended_by": ("time" if failed.timed_out else "memory") if failed else "max_length",
        "reason": failed.reason if failed else "",
        "tries": len(tries),
        "command": series.command(best.length if best else options.min_length),
    }


def _tokens_per_second(series: Series, best: Try) -> float:
    assert best.step_seconds is not None
    return round(best.length * series.num_ranks / series.sharing / best.step_seconds, 1)


def _progress(series: Series, outcome: Try) -> str:
    ranks = f"{series.sharing} rank{'s' * (series.sharing > 1)} a sequence"
    words = f"{series.features}, {ranks}: {outcome.length:,} tokens"
    if not outcome.fits:
        return f"{words} do not fit: {outcome.reason}"
    assert outcome.peak_bytes is not None
    return f"{words} fit: {outcome.peak_bytes / 2**30:.2f} GiB, {outcome.step_seconds:.3g} s a step"


def _result(
    options: LengthOptions,
    series: Series,
    rows: Sequence[dict[str, Any]],
    left_out: Mapping[str, str],
    *,
    complete: bool,
) -> dict[str, Any]:
    from swift_dist.runs.files import now

    return {
        "model": options.model or options.job,
        "memory": series.memory,
        "on_cuda": series.on_cuda,
        "min_length": options.min_length,
        "max_length": options.max_length,
        "steps": options.steps,
        "date": now(),
        "command": _command(),
        "versions": dict(series.versions),
        "complete": complete,
        "left_out": dict(left_out),
        "rows": list(rows),
    }


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _planned(options: LengthOptions, series: Sequence[Series]) -> dict[str, Any]:
    from swift_dist.bench.search import lengths_between

    lengths = lengths_between(options.min_length, options.max_length)
    return {
        "dry_run": True,
        "series": [
            {"sharing": s.sharing, "ranks": s.num_ranks, "features": s.features, "command": s.command(lengths[0])}
            for s in series
        ],
        "lengths": list(lengths),
        "memory": series[0].memory,
        "on_cuda": series[0].on_cuda,
    }


def render(result: dict[str, Any]) -> Iterator[str]:
    """The table, and where the files are; of a dry run what would be tried."""
    if result.get("dry_run"):
        lengths = result["lengths"]
        yield f"{len(lengths)} lengths from {lengths[0]:,} to {lengths[-1]:,} tokens could be tried of each of:"
        yield from (f"{s['features']}, {s['sharing']} of {s['ranks']} ranks: {s['command']}" for s in result["series"])
        return
    from swift_dist.bench.report import table

    yield from table(result["rows"])
    yield f"{result['output']}: length.json, length.md, length.svg, length.png"
