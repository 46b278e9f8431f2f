"""Whether two checkpoints hold the same weights, and compute the same: what `verify` and `--verify` judge by."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from swift_dist.convert.adapters import differing_scalings, like
from swift_dist.convert.sources import Source, open_source
from swift_dist.convert.work import do_units
from swift_dist.converters.copying import Compare, Difference, Facts
from swift_dist.converters.mapping import weights
from swift_dist.converters.plan import Copy, CopyPlan, HFSide, Region, make_plan, repeated_names
from swift_dist.converters.stored import BY_OPTION, TO_TORCH
from swift_dist.converters.units import compare_units
from swift_dist.errors import JobError, RunError

_AUTO_PARAMETERS = 2_000_000_000  # fp32 copies of transformers and Megatron, one after the other
_SHARE_OF_MEMORY = 0.5
_TRAINING = frozenset(  # of megatron-core's arguments: what does not change what a model computes once it is trained
    """
    init_method_std attention_dropout hidden_dropout max_sequence_length moe_aux_loss_coeff moe_z_loss_coeff
    moe_router_load_balancing_type
    """.split()
)
_LOGITS_MODULE = "swift_dist.engines.megatron.logits"  # a process of its own: this room knows no engines


def compare(
    a: Source, b: Source, options: Any, *, cast: str | None = None, tolerance: float = 0.0, name: str = "verify"
) -> dict[str, Any]:
    """Compare every weight of `b` with what `a` gives for it, and logits where that is possible.

    Args:
        options: a section with the fields of `WorkOptions` and `LogitsOptions`.
        cast: `b` was converted to this dtype: `a`'s values are converted likewise first.
        tolerance: largest difference of two values; 0: every bit.

    Returns:
        ``{"equal", "weights_equal", "problems", "tensors", "bytes", "tolerance", "cast", "padding_elements",
        "non_finite", "logits", "logits_skipped"}``; `problems` is empty where they are equal.

    Raises:
        JobError: logits are asked for and cannot be compared. RunError: a file cannot be read.
    """
    a, b = like(a, b), like(b, a)
    if (a.family.name, a.rows) != (b.family.name, b.rows):
        problem = f"{b.path} holds another model than {a.path}: {_different_rows(a, b)}"
        return _verdict([problem], [], CopyPlan(), Facts((0, 0), 0), tolerance, cast, (None, "other models"))
    side = b.side
    if isinstance(side, HFSide):
        side = HFSide(side.tensors, repeated_names(b.rows, side.tensors))
    plan = make_plan(a.rows, a.side, side)
    problems = [*differing_scalings(a, b), *_different_settings(a, b)]
    problems += [*_coverage(a, plan), *_unwritten(b, plan)]
    regions = [*plan.regions, *_twins(a), *_twins(b)]
    found = _run(name, Compare(tolerance, cast), regions, options, b.path)
    problems += [f"{tensor}: {what}" for tensor, what in sorted(found.differences.items())]
    logits = _logits(a, b, options, cast, _why_not_these(found, tolerance))
    return _verdict(
        problems, _logits_problems(logits[0], options.logits_tolerance), plan, found, tolerance, cast, logits
    )


def _verdict(
    problems: list[str],
    of_logits: list[str],
    plan: CopyPlan,
    found: Facts,
    tolerance: float,
    cast: str | None,
    logits: tuple[dict[str, Any] | None, str],
) -> dict[str, Any]:
    return {
        "equal": not problems and not of_logits,
        "weights_equal": not problems,
        "problems": [*problems, *of_logits],
        "tensors": sum(1 for region in plan.regions if region.copies),
        "bytes": sum(region.num_bytes for region in plan.regions if region.copies),
        "tolerance": tolerance,
        "cast": cast,
        "padding_elements": plan.padding,
        "non_finite": found.non_finite,
        "logits": logits[0],
        "logits_skipped": logits[1],
    }


def verify_conversion(source: Source, folder: Path, kind: str, options: Any) -> dict[str, Any]:
    """Open what was written as anybody would, and compare it with the source."""
    written = open_source(str(folder), key="target", known=source.hf_config, adapters=True)
    if written.kind != kind:
        raise RunError(f"{folder} was written as {kind} and is read as {written.kind}")
    # A folder's config says what its weights are; that of the source may say more (layers that were left out).
    cast = BY_OPTION[options.dtype] if options.dtype else None
    return compare(source, written, options, cast=cast, name=f"verify {kind}")


def require_comparable(source: Source, kind: str, options: Any) -> None:
    """What `compare` will ask for is there, so that nothing is written before that is known.

    Args:
        kind: of what is going to be written.

    Raises:
        JobError: the config describes what megatron-core does not compute, or logits are asked for in vain.
    """
    reason = _why_no_logits(source, {source.kind: source, kind: source})
    if options.logits == "always" and reason:
        raise JobError("logits", f"cannot be compared: {reason}", "leave out --logits always")
    try:
        source.family.transformer_config(source.hf_config)
    except JobError as error:
        key = error.key.removeprefix("model.config.")
        raise JobError(
            "verify", f"cannot compare: {key} {error.message}", f"leave out --verify; {error.remedy}"
        ) from None


def require_equal_twins(source: Source, options: Any) -> None:
    """Tensors of a source that must repeat each other do so.

    Raises:
        JobError: naming those that do not.
    """
    differing = _run("compare repeated weights", Compare(), _twins(source), options, source.path).differences
    if differing:
        names = sorted(differing)
        raise JobError(
            "source",
            f"{names[0]} must repeat another tensor of {source.path} and differs ({differing[names[0]]})"
            + (f"; and {len(names) - 1} more" if len(names) > 1 else ""),
            "set tie_word_embeddings to false in config.json if the model was trained so; else get the files again",
        )


def _run(name: str, task: Compare, regions: Iterable[Region], options: Any, folder: Path) -> Facts:
    total = Facts((0, 0), 0)

    def note(facts: Facts) -> None:
        for tensor, difference in facts.differences.items():
            total.differences.setdefault(tensor, Difference()).add(difference)
        for tensor, count in facts.non_finite.items():
            total.non_finite[tensor] = total.non_finite.get(tensor, 0) + count

    do_units(name, task, compare_units(regions), options, folder, note)
    return total


def _twins(source: Source) -> list[Region]:
    """Pairs that must be equal, as regions to compare."""
    return [
        Region(replace(other, extents=(extent,)), (Copy(extent.box, first, extent.box),))
        for first, other in source.twins
        for extent in other.extents
    ]


def _coverage(a: Source, plan: CopyPlan) -> list[str]:
    """Every source tensor is used, and each of its elements once (vocabulary padding aside)."""
    twins, padded = {other.name for _, other in a.twins}, _padded_names(a)
    problems = []
    for name, stored in a.side.tensors.items():
        used = plan.used.get(name, 0)
        whole = used == stored.num_elements or (used < stored.num_elements and name.endswith(padded))
        if not whole and name not in twins:
            problems.append(f"{name}: {used} of {stored.num_elements} elements of the source are used")
    return problems


def _unwritten(b: Source, plan: CopyPlan) -> list[str]:
    """Every tensor of the target comes from the source (a rank's share of the vocabulary may be padding alone)."""
    twins, padded = {other.name for _, other in b.twins}, _padded_names(b)
    return [
        f"{region.stored.name}: nothing of the source belongs there"
        for region in plan.regions
        if not region.copies and region.stored.name not in twins and not region.stored.name.endswith(padded)
    ]


def _padded_names(source: Source) -> tuple[str, ...]:
    """Ends of the names of stored tensors to which Megatron may have added rows (legacy ones begin with a folder)."""
    return () if source.kind == "hf" else tuple(tensor.name for tensor in weights(source.rows) if tensor.padded)


def _different_rows(a: Source, b: Source) -> str:
    if (a.lora is None) != (b.lora is None):
        return "one is an adapter, the other a model"
    if a.family.name != b.family.name:
        return f"{b.family.name}, not {a.family.name}"
    theirs = {tensor.name: tensor.shape for tensor in weights(a.rows)}
    for tensor in weights(b.rows):
        if theirs.get(tensor.name) != tensor.shape:
            other = theirs.get(tensor.name)
            return f"{tensor.name} is {list(tensor.shape)}, not {list(other)}" if other else f"it has {tensor.name}"
    lacking = sorted(theirs.keys() - {tensor.name for tensor in weights(b.rows)})
    return f"it lacks {lacking[0]}" if lacking else "its tensors consist of others"


def _different_settings(a: Source, b: Source) -> list[str]:
    """Equal weights compute different things where the two config.json say so."""
    first, second = ({**s.family.transformer_config(s.hf_config), **s.family.gpt_model(s.hf_config)} for s in (a, b))
    found = [
        f"{name}: {first.get(name)!r} by A's config.json, {value!r} by B's"
        for name, value in ((name, second.get(name)) for name in sorted({*first, *second}))
        if first.get(name) != value and name not in _TRAINING
    ]
    if a.family.rope(a.hf_config) != b.family.rope(b.hf_config):
        found.append("the two config.json give different rotary frequencies")
    return found + [problem for source in (a, b) for problem in _differing_arguments(source)]


def _differing_arguments(source: Source) -> list[str]:
    """Where the arguments in a legacy checkpoint say otherwise than the config.json that was used for it."""
    from swift_dist.converters.legacy_arguments import config_of_arguments

    try:
        config = config_of_arguments(source.legacy.args) if source.legacy is not None else None
    except JobError:  # they do not describe a model
        return []
    if config is None or config.get("model_type") != source.family.name:
        return []
    family = source.family
    stated, used = family.transformer_config(config), family.transformer_config(source.hf_config)
    found = [
        f"{name}: {value!r} by the arguments in {source.path}, {used.get(name)!r} by config.json"
        for name, value in stated.items()
        if used.get(name) != value and name not in _TRAINING
    ]
    if family.rope(config) != family.rope(source.hf_config):
        found.append(f"the arguments in {source.path} give other rotary frequencies than config.json")
    return found


def _why_not_these(found: Facts, tolerance: float) -> str:
    """Why logits of these weights cannot be compared, if so."""
    if found.non_finite:
        return "the weights hold NaN or infinity"
    return "the weights may differ by --tolerance" if tolerance else ""


def _logits(a: Source, b: Source, options: Any, cast: str | None, reason: str) -> tuple[dict[str, Any] | None, str]:
    """(the comparison of logits, "") or (None, why there is none)."""
    if options.logits == "never":
        return None, "--logits never"
    by_kind = {source.kind: source for source in (a, b)}
    reason = reason or _why_no_logits(a, by_kind)
    if reason:
        if options.logits == "always":
            raise JobError("logits", f"cannot be compared: {reason}", "leave out --logits always")
        return None, reason
    request: dict[str, Any] = {"hf": str(by_kind["hf"].path), "checkpoint": str(by_kind["torch_dist"].path)}
    request["cast"] = TO_TORCH[cast] if cast else None  # both compute in fp32, from weights rounded alike
    with tempfile.TemporaryDirectory(prefix="swift_dist_logits_") as folder:
        file = Path(folder) / "request.json"
        file.write_text(json.dumps(request))
        done = subprocess.run([sys.executable, "-m", _LOGITS_MODULE, str(file)], capture_output=True, text=True)
    try:
        return json.loads(done.stdout), ""  # also where no layout could be compared: each says why
    except ValueError:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RunError(f"the comparison of logits failed:\n{last}", "--logits never compares weights only") from None


def _why_no_logits(a: Source, by_kind: dict[str, Source]) -> str:
    import psutil

    if a.merged is not None:
        return "an adapter is merged into the weights"
    if by_kind.keys() != {"hf", "torch_dist"} or any(source.lora or source.merged for source in by_kind.values()):
        return "that takes a Hugging Face folder and a torch_dist checkpoint"
    if not a.family.trainable:
        return f"{a.family.name} models are converted, not run, by this version"
    if any(stored.dtype.startswith("F8") for stored in by_kind["hf"].side.tensors.values()):
        return "the weights are quantised"
    parameters = a.family.shape(a.hf_config).num_parameters()
    if parameters > _AUTO_PARAMETERS or parameters * 4 * 2 > psutil.virtual_memory().available * _SHARE_OF_MEMORY:
        return f"{parameters:,} parameters do not fit in this machine's memory"
    return ""


def _logits_problems(logits: dict[str, Any] | None, tolerance: float) -> list[str]:
    from swift_dist.convert.report import layout_name

    problems = []
    for entry in logits["layouts"] if logits else ():
        where = f"logits at {layout_name(entry)}"
        if entry.get("error"):
            problems.append(f"{where}: {entry['error']}")
        elif not entry["relative"] <= tolerance:
            problems.append(f"{where}: differ by {entry['relative']:.2e} of the largest logit")
        elif not entry["same_argmax"]:
            problems.append(f"{where}: another token is the likeliest")
    return problems
