"""`swift-dist convert verify A B`: do two checkpoints, of any formats, hold the same weights and compute the same?"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from swift_dist.convert.options import LogitsOptions, WorkOptions, refuse_unread
from swift_dist.convert.report import describe_verdict
from swift_dist.convert.sources import find_kind, open_source, read_config
from swift_dist.convert.verification import compare
from swift_dist.converters.stored import BY_OPTION
from swift_dist.errors import EXIT_DONE, EXIT_FAILED, JobError, listed


class VerifyOptions(WorkOptions, LogitsOptions):
    a: str = Field(description="a model folder or checkpoint of any format")
    b: str = Field(description="the other one")
    dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="B was converted to this dtype: A's values are converted likewise before they are compared"
    )
    tolerance: float = Field(0.0, ge=0, description="largest difference of two values (default: every bit is equal)")


def run(options: VerifyOptions) -> dict[str, Any]:
    """Compare.

    Returns:
        what `compare` says, with ``a``, ``b``, ``family``, ``seconds`` and ``exit_code`` 1 where they are not equal.

    Raises:
        JobError: one of them cannot be opened, or they are different models. RunError: a file cannot be read.
    """
    began = time.monotonic()
    refuse_unread(options)
    known = None
    for path in (options.a, options.b):
        kind, folder = find_kind(Path(path), "a" if path == options.a else "b")
        if kind == "hf" and options.hf_config is None:
            known = read_config(folder, "hf_config")
    a = open_source(options.a, options.hf_config, "a", known, adapters=True)
    b = open_source(options.b, options.hf_config, "b", known, adapters=True)
    if options.dtype is not None and BY_OPTION[options.dtype] not in {s.values_dtype for s in b.side.tensors.values()}:
        raise JobError(
            "dtype", f"no tensor of {b.path} is stored as {options.dtype}", "leave out --dtype, or swap A and B"
        )
    verdict = compare(
        a, b, options, cast=BY_OPTION[options.dtype] if options.dtype else None, tolerance=options.tolerance
    )
    return {
        "a": str(a.path),
        "b": str(b.path),
        "formats": [a.kind, b.kind],
        "family": a.family.name,
        **verdict,
        "seconds": round(time.monotonic() - began, 3),
        "exit_code": EXIT_DONE if verdict["equal"] else EXIT_FAILED,
    }


def render(result: Mapping[str, Any]) -> str:
    """The verdict for people."""
    a, b = (f"{path} ({kind})" for path, kind in zip((result["a"], result["b"]), result["formats"], strict=True))
    lines = [f"{'equal' if result['equal'] else 'NOT equal'}: {a} and {b}", f"  {describe_verdict(result)}"]
    if result["problems"]:
        lines.append(f"  {listed(_grouped(result['problems']), 20)}")
    if result["non_finite"]:
        lines.append(f"  NaN or infinite values in {len(result['non_finite'])} tensors")
    return "\n".join(lines)


def _grouped(problems: list[str]) -> list[str]:
    """Tensors with the same problem on one line."""
    by_text: dict[str, list[str]] = {}
    for problem in problems:
        name, _, text = problem.partition(": ")
        by_text.setdefault(text or name, []).append(problem)
    return [same[0] if len(same) == 1 else f"{len(same)} x {text}" for text, same in by_text.items()]
