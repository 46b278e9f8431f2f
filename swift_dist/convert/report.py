"""What was converted, from what, by which rows, with which hashes: for programs and for people, beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from swift_dist import __version__
from swift_dist.convert.sources import Source
from swift_dist.converters.plan import describe_rows

REPORT_NAME, PAGE_NAME = "conversion_report.json", "conversion_report.md"
_PACKAGES = ("numpy", "ml_dtypes", "xxhash", "torch", "megatron-core", "safetensors", "transformers")


def write_report(
    folder: Path,
    summary: Mapping[str, Any],
    source: Source,
    source_hashes: Mapping[str, Any],
    target_hashes: Mapping[str, Any],
) -> list[str]:
    """Write both; returns their names.

    Args:
        summary: what the verb answers with.
        source_hashes: xxh3-128 of each source tensor's bytes, a value for each of its extents in the files.
        target_hashes: by target tensor: [box, xxh3-128] for each part that lies in one piece.
    """
    files = [{"name": Path(file).name, "bytes": Path(file).stat().st_size} for file in source.files]
    report = {
        "format": 1,
        "swift_dist": __version__,
        "versions": {name: version(name) for name in _PACKAGES},
        **summary,
        "source_files": files,
        "rows": describe_rows(source.rows),
        "hash": "xxh3-128",
        "source_hashes": dict(sorted(source_hashes.items())),
        "target_hashes": dict(sorted(target_hashes.items())),
    }
    (folder / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / PAGE_NAME).write_text(_page(report), encoding="utf-8")
    return [REPORT_NAME, PAGE_NAME]


def _page(report: Mapping[str, Any]) -> str:
    verified = report["verified"]
    lines = [
        f"# {report['verb']}: {report['family']}, {report['parameters']:,} parameters",
        "",
        f"From `{report['source']}` ({len(report['source_files'])} files), {report['bytes_read']:,} bytes read, "
        f"{report['bytes']:,} written as {report['dtype']} in {report['seconds']} s by swift-dist "
        f"{report['swift_dist']}.",
        "",
        *([f"- adapter merged into the weights: `{report['adapter']}`"] if report["adapter"] else []),
        f"- tensors: {report['tensors']}; not weights, left out: {report['ignored_tensors']}",
        f"- elements of padding: {report['padding_elements']}",
        f"- tensors with NaN or infinity: {report['non_finite'] or 'none'}",
        f"- verified: {describe_verdict(verified) if verified else 'no (--verify true was not given)'}",
        "",
        "## Mapping rows",
        "",
        *(f"- `{row}`" for row in report["rows"]),
        "",
        f"Hashes of all tensors ({report['hash']}) are in {REPORT_NAME}.",
        "",
    ]
    return "\n".join(lines)


def describe_verdict(verdict: Mapping[str, Any]) -> str:
    """A verdict of `verify` in one line."""
    if not verdict["equal"]:
        return f"{len(verdict['problems'])} difference(s)"
    how = f"within {verdict['tolerance']}" if verdict["tolerance"] else "bit for bit"
    text = f"{verdict['tensors']} tensors equal {how}"
    logits = verdict["logits"]
    if not logits:
        return f"{text}; logits not compared ({verdict['logits_skipped']})"
    worst = max(entry["relative"] for entry in logits["layouts"])
    names = ", ".join(layout_name(entry) for entry in logits["layouts"])
    return f"{text}; logits within {worst:.1e} at {names}"


def layout_name(entry: Mapping[str, Any]) -> str:
    """TP2 PP2 and the like; TP1 for a single process."""
    parts = [f"{name.upper()}{entry[name]}" for name in ("tp", "pp", "ep", "vpp") if (entry.get(name) or 1) > 1]
    return " ".join(parts) or "TP1"


def render_conversion(result: Mapping[str, Any]) -> str:
    """The result of a conversion for people."""
    verb = "would write" if result["dry_run"] else "wrote"
    step = f", step {result['step']}" if result["step"] is not None else ""
    lines = [
        f"{verb} {result['target']}: {result['family']}, {result['parameters']:,} parameters as {result['dtype']}, "
        f"{result['bytes'] / 2**20:,.1f} MiB in {len(result['files'])} file(s)",
        f"  from {result['source']}{step}"
        + (f"; {result['ignored_tensors']} tensors of it are not weights" if result["ignored_tensors"] else "")
        + (f"; with the adapter {result['adapter']} merged" if result["adapter"] else "")
        + (f"; {result['vocabulary_rows_dropped']} rows of padding" if result["vocabulary_rows_dropped"] else ""),
        f"  beside the weights: {', '.join(result['other_files']) or 'nothing'}",
    ]
    if result["dry_run"]:
        lines.append(
            f"  {result['bytes_read'] / 2**30:,.2f} GiB to read, {result['bytes'] / 2**30:,.2f} GiB to write: about "
            f"{result['estimated_seconds']:,} s at --storage_rate, "
            f"{result['estimated_memory'] / 2**30:,.2f} GiB of memory"
        )
        return "\n".join(lines)
    if result["resumed_files"]:
        lines.append(f"  {result['resumed_files']} files were there from an interrupted run")
    lines.append(
        f"  {result['seconds']} s; {describe_verdict(result['verified']) if result['verified'] else 'not verified'}"
    )
    return "\n".join(lines)
