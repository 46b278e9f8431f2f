"""One conversion from start to end: plan, copy (going on where an interrupted run was), verify, publish."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from swift_dist import __version__
from swift_dist.convert.options import ConvertOptions
from swift_dist.convert.report import write_report
from swift_dist.convert.sources import Source
from swift_dist.convert.work import do_units, num_workers
from swift_dist.converters.copying import Facts, Fill
from swift_dist.converters.mapping import weights
from swift_dist.converters.plan import CopyPlan, Side, make_plan
from swift_dist.converters.safetensors_io import Layout, parse_size
from swift_dist.converters.stored import ITEM_SIZES, OPTION_OF
from swift_dist.converters.target_folder import TargetFolder, as_run_error
from swift_dist.converters.units import fill_units
from swift_dist.errors import JobError, RunError, listed

logger = logging.getLogger(__name__)

_DRIVER_BYTES, _WORKER_BYTES, _COPY_BYTES = 64 << 20, 48 << 20, 2000  # measured: tests/benchmarks/bench_convert.py
_NAMED = 5
_VOCABULARY_MULTIPLE = 8  # of --make-vocab-size-divisible-by, whose default is 128


@dataclass
class Target:
    """What is going to be written.

    Args:
        layout: the weight files. side: where in them the weights lie.
        identity: options that its content depends on, beyond dtype and shard size.
        finish: writes all that is not weights into the folder; returns the names of those files.
        other_files: their names, for a dry run.
    """

    kind: str
    layout: Layout
    side: Side
    identity: dict[str, Any]
    finish: Callable[[Path], list[str]]
    other_files: list[str]


@dataclass
class _Seen:
    """What workers reported, by file and over all."""

    hashes: dict[str, list[Any]] = field(default_factory=dict)
    source_hashes: dict[str, list[str]] = field(default_factory=dict)
    non_finite: dict[str, int] = field(default_factory=dict)

    def add(self, facts: Mapping[str, Any]) -> None:
        for name, parts in facts["hashes"].items():
            self.hashes.setdefault(name, []).extend(parts)
        self.source_hashes.update(facts["source_hashes"])
        for name, count in facts["non_finite"].items():
            self.non_finite[name] = self.non_finite.get(name, 0) + count


class Conversion:
    """A source, a target, and the copies between them.

    Args:
        began: when the command did (``time.monotonic``).

    Raises (the constructor):
        ValueError: the rows are wrong.
    """

    def __init__(self, verb: str, options: ConvertOptions, source: Source, target: Target, began: float) -> None:
        self.verb, self.options, self.source, self.target, self.began = verb, options, source, target, began
        self.plan: CopyPlan = make_plan(source.rows, source.side, target.side)

    def summary(self) -> dict[str, Any]:
        """What is read and written, from metadata alone."""
        tensors, source = self.target.layout.tensors, self.source.side.tensors
        num_bytes = sum(stored.num_bytes for stored in tensors.values())
        read = sum(count * ITEM_SIZES[source[name].dtype] for name, count in self.plan.used.items())
        parameters = sum(self.plan.used.values())
        dtypes = sorted({stored.dtype for stored in tensors.values()})
        copies = sum(len(region.copies) for region in self.plan.regions)
        rate = parse_size(self.options.storage_rate, "storage_rate")
        return {
            "verb": self.verb,
            "source": str(self.source.path),
            "target": self.options.target,
            "family": self.source.family.name,
            "adapter": str(self.source.merged.path) if self.source.merged else None,
            "step": self.source.record.get("step"),
            "dtype": OPTION_OF.get(dtypes[0], dtypes[0]) if len(dtypes) == 1 else "mixed",
            "tensors": len(tensors),
            "parameters": parameters,
            "bytes_read": read,
            "bytes": num_bytes,
            "largest_tensor": max((stored.num_bytes for stored in tensors.values()), default=0),
            "files": [file.name for file in self.target.layout.files],
            "other_files": self.target.other_files,
            "ignored_tensors": len(self.source.ignored),
            "padding_elements": self.plan.padding,
            "vocabulary_rows_dropped": self._dropped_rows(),
            "estimated_memory": _DRIVER_BYTES + num_workers(self.options) * _WORKER_BYTES + copies * _COPY_BYTES,
            "estimated_seconds": round((read + num_bytes) / rate, 1),
            "dry_run": self.options.dry_run,
        }

    def _dropped_rows(self) -> int:
        """Rows of the source's embedding or output layer beyond the vocabulary: Megatron's padding, or a wrong config.

        Raises:
            JobError: it cannot be padding, which makes the number of rows a multiple of 8 at least.
        """
        most = 0
        for tensor in weights(self.source.rows):
            holds = list(self.source.side.hold(tensor)) if tensor.padded and self.source.kind == "torch_dist" else []
            for hold in holds:
                rows = self.source.side.tensors[hold.name].shape[0]
                if rows > tensor.shape[0] and rows % _VOCABULARY_MULTIPLE:
                    raise JobError(
                        "hf_config",
                        f"vocab_size {tensor.shape[0]}, but {hold.name} has {rows} rows, which is no padded vocabulary",
                        "give the config.json that the checkpoint was trained with: --hf_config PATH",
                    )
                most = max(most, rows - tensor.shape[0])
        return most

    def run(self) -> dict[str, Any]:
        """Convert, or with ``dry_run`` only plan.

        Raises:
            JobError: something is wrong, found before anything was written. RunError: the work folder stays, and the
                same command goes on with it.
        """
        summary = self.summary()
        if self.source.path.absolute() in Path(self.options.target).absolute().parents:
            raise JobError("target", f"{self.options.target} is inside the source", "name a folder beside it")
        if not self.options.dry_run:
            with TargetFolder(Path(self.options.target), self._identity()) as folder:
                try:
                    summary |= self._write(folder, summary)
                except OSError as error:
                    raise as_run_error(error) from error
                except KeyboardInterrupt:
                    raise KeyboardInterrupt(
                        f"interrupted: the same command goes on with the {len(folder.written)} files that are whole"
                    ) from None
        return {**summary, "seconds": round(time.monotonic() - self.began, 3)}

    def _identity(self) -> dict[str, Any]:
        """Everything that the content of the target depends on."""
        stats = [(file, Path(file).stat()) for file in self.source.files]
        config = hashlib.sha256(json.dumps(self.source.hf_config, sort_keys=True).encode()).hexdigest()
        return {
            "verb": self.verb,
            "source": [[str(Path(file).absolute()), stat.st_size, stat.st_mtime_ns] for file, stat in stats],
            "config": config,
            "blocks": sorted({stored.block for stored in self.source.side.tensors.values() if stored.scale}),
            "swift_dist": __version__,
            "dtype": self.options.dtype,
            "max_shard_size": parse_size(self.options.max_shard_size),
            "target": self.target.kind,
            **self._adapter_identity(),
            **self.target.identity,
        }

    def _adapter_identity(self) -> dict[str, Any]:
        """How an adapter is scaled, whether it is the source or is merged into it."""
        adapter = self.source.merged or self.source
        return {"adapter": dict(adapter.lora.config)} if adapter.lora is not None else {}

    def _write(self, folder: TargetFolder, summary: dict[str, Any]) -> dict[str, Any]:
        from swift_dist.convert.verification import require_comparable, require_equal_twins, verify_conversion

        require_equal_twins(self.source, self.options)
        if self.options.verify:
            require_comparable(self.source, self.target.kind, self.options)
        resumed = len(folder.written)
        seen = self._fill(folder)
        if self.options.strict and seen.non_finite:  # found by an interrupted run without --strict
            name, count = next(iter(seen.non_finite.items()))
            raise RunError(f"{name}: {count} values are NaN or infinite", "use another source, or leave out --strict")
        for name in list(seen.non_finite)[:_NAMED]:
            logger.warning("%s: %d values are NaN or infinite", name, seen.non_finite[name])
        if len(seen.non_finite) > _NAMED:
            logger.warning("and %d more tensors", len(seen.non_finite) - _NAMED)
        small = self.target.finish(folder.path)
        result: dict[str, Any] = {"resumed_files": resumed, "non_finite": seen.non_finite, "verified": None}
        if self.options.verify:
            result["verified"] = verify_conversion(self.source, folder.path, self.target.kind, self.options)
            self._require_equal(result["verified"], folder)
        report = {**summary, **result, "seconds": round(time.monotonic() - self.began, 3)}
        small += write_report(folder.path, report, self.source, seen.source_hashes, seen.hashes)
        folder.publish(small)
        return result

    def _require_equal(self, verdict: Mapping[str, Any], folder: TargetFolder) -> None:
        problems = listed(verdict["problems"])
        if not verdict["weights_equal"]:
            folder.discard()
            raise RunError(
                f"the written weights are not those of the source:\n  {problems}",
                "this is a defect of swift_dist or of the storage: nothing was kept",
            )
        if not verdict["equal"]:
            raise RunError(
                f"the weights are equal, and transformers and Megatron compute different things:\n  {problems}",
                f"nothing got the name {folder.target}; --logits never goes on with the files that are written",
            )

    def _fill(self, folder: TargetFolder) -> _Seen:
        """Write the weight files that are not whole yet."""
        files, whole_files = self.target.layout.files, self.options.launcher == "ray"
        sources = [self.source.side.tensors[name] for name in self.plan.used]
        sources += [stored.scale for stored in sources if stored.scale is not None]
        sources += self.source.merged.side.tensors.values() if self.source.merged else ()
        units = fill_units(files, self.plan.regions, sources, folder.written, whole_files)
        todo = [(file.name, file.size) for file in files if file.name not in folder.written]
        seen = _Seen()
        for facts in folder.written.values():
            seen.add(facts)
        if folder.written:
            logger.info(
                "going on where an interrupted run was: %d of %d files are whole", len(folder.written), len(files)
            )
        folder.create(todo)
        left: dict[int, list[Facts | None]] = {}
        for unit in units:
            left.setdefault(unit.id[0], []).append(None)
        done_bytes = sum(file.size for file in files if file.name in folder.written)
        task = Fill(str(folder.path), tuple((file.name, file.size) for file in files), whole_files, self.options.strict)
        pending: list[Future[None]] = []
        with ThreadPoolExecutor(1) as syncing:

            def note(facts: Facts) -> None:
                parts = left[facts.id[0]]
                parts[parts.index(None)] = facts
                for future in pending:
                    if future.done():
                        future.result()
                if None not in parts:
                    merged = _merged([part for part in parts if part is not None])
                    seen.add(merged)
                    pending.append(syncing.submit(folder.record, files[facts.id[0]].name, merged))

            do_units(self.verb, task, units, self.options, folder.path, note, done_bytes)
            for future in pending:
                future.result()
        return seen


def _merged(parts: list[Facts]) -> dict[str, Any]:
    """The facts of a file as plain values, its tensors in the order of their bytes."""
    total = _Seen()
    for facts in sorted(parts, key=lambda facts: facts.id):
        total.add(json.loads(json.dumps(asdict(facts))))
    return asdict(total)
