"""`swift-dist convert reshard SRC DST`: a Megatron checkpoint for another layout.

Legacy checkpoints (``mp_rank_*``) become torch_dist, which any layout loads, or legacy files of other degrees;
torch_dist becomes legacy files where a program wants those. torch_dist itself needs no resharding.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from swift_dist.convert.companions import companions, write_companions
from swift_dist.convert.conversion import Conversion, Target
from swift_dist.convert.hf_to_megatron import dist_target
from swift_dist.convert.options import ConvertOptions, refuse_unread
from swift_dist.convert.report import render_conversion
from swift_dist.convert.sources import HF_SUBFOLDER, Source, open_source
from swift_dist.converters.plan import megatron_dtypes
from swift_dist.converters.stored import BY_OPTION
from swift_dist.converters.target_folder import check_target
from swift_dist.errors import JobError
from swift_dist.models import find_family, rope_parameters

logger = logging.getLogger(__name__)
render = render_conversion

_DEGREES = ("tp", "pp", "ep", "vpp", "etp")


class ReshardOptions(ConvertOptions):
    source: str = Field(description="Megatron checkpoint (mp_rank_* or torch_dist), or the folder above it")
    target: str = Field(description="checkpoint to write; must not exist")
    format: Literal["torch_dist", "legacy"] | None = Field(
        None, description="of the target (default: legacy if a degree is given, else torch_dist)"
    )
    tp: int | None = Field(None, gt=0, description="tensor-parallel ranks of a legacy target")
    pp: int | None = Field(None, gt=0, description="pipeline stages of a legacy target")
    ep: int | None = Field(None, gt=0, description="expert-parallel ranks of a legacy target")
    vpp: int | None = Field(None, gt=0, description="model chunks of a pipeline stage of a legacy target")
    etp: int | None = Field(None, gt=0, description="tensor-parallel ranks of an expert (default: tp)")


def run(options: ReshardOptions) -> dict[str, Any]:
    """Convert, or with ``dry_run`` only plan. Goes on where an interrupted run of the same command was.

    Returns:
        what `Conversion.summary` and `Conversion.run` say.

    Raises:
        JobError: source, target, config or layout are wrong; nothing was written.
        RunError: reading or writing failed; the same command goes on with the files that are whole.
    """
    began = time.monotonic()
    degrees = {name: getattr(options, name) for name in _DEGREES if getattr(options, name) is not None}
    wanted = options.format or ("legacy" if degrees else "torch_dist")
    _refuse_unread(options, wanted, degrees)
    check_target(Path(options.target))
    source = open_source(options.source, options.hf_config)
    if source.kind == "hf":
        raise JobError("source", f"{options.source} is a Hugging Face folder", "use convert hf-to-megatron")
    if source.kind == wanted == "torch_dist" and options.format is None:
        remedy = (
            "use it as it is, or say --format torch_dist to write its weights alone, in another --dtype if you like"
        )
        raise JobError("source", f"{options.source} is torch_dist already: any layout loads it", remedy)
    target = dist_target(source, options) if wanted == "torch_dist" else _legacy_target(source, options, degrees)
    return Conversion("reshard", options, source, target, began).run()


def _refuse_unread(options: ReshardOptions, wanted: str, degrees: Mapping[str, int]) -> None:
    """`refuse_unread`, and what this verb or this kind of target has no use for."""
    given = options.model_fields_set
    if options.logits == "always" or "logits_tolerance" in given:
        raise JobError(
            "logits" if options.logits == "always" else "logits_tolerance",
            "reshard compares no logits: that takes a Hugging Face folder and a torch_dist checkpoint",
            "leave it out; convert verify compares the two",
        )
    refuse_unread(options)
    if wanted == "torch_dist" and degrees:
        name = next(iter(degrees))
        raise JobError(name, "a torch_dist checkpoint has no degrees: any layout loads it", f"leave out --{name}")
    if wanted == "legacy" and "max_shard_size" in given:
        raise JobError("max_shard_size", "a legacy checkpoint has one file for each rank", "leave out --max_shard_size")


def _legacy_target(source: Source, options: ReshardOptions, degrees: dict[str, int]) -> Target:
    from swift_dist.converters.legacy_layout import lay_out_legacy

    wanted = BY_OPTION[options.dtype] if options.dtype else None
    made = lay_out_legacy(
        source.rows,
        source.family.shape(source.hf_config),
        megatron_dtypes(source.rows, source.side, wanted),
        args=_arguments(source, degrees.get("pp", 1)),
        iteration=_iteration(source),
        **degrees,
    )
    files = companions(source)

    def finish(folder: Path) -> list[str]:
        for name, text in made.other_files.items():
            (folder / name).write_text(text)
        written = write_companions(folder / HF_SUBFOLDER, source, files, wanted, complete=False)
        return [*made.other_files, *(f"{HF_SUBFOLDER}/{name}" for name in written)]

    names = [*made.other_files, *(f"{HF_SUBFOLDER}/{name}" for name in (*files, "config.json"))]
    return Target("legacy", made.layout, made.side, {"degrees": degrees}, finish, names)


def _iteration(source: Source) -> int | None:
    """None: a ``release``, whose files have iteration 0 as those of a checkpoint of step 0 have."""
    if source.legacy is not None and source.legacy.folder.name == "release":
        return None
    step: int | None = source.record.get("step")
    return step


def _arguments(source: Source, pp: int) -> dict[str, Any]:
    """Megatron-LM's arguments for the written files: the source's own, or those of its model.

    Args:
        pp: pipeline stages of the target.

    Raises:
        JobError: the source has none, and none say what its model is.
    """
    from swift_dist.converters.legacy_arguments import arguments_of_model, inexpressible
    from swift_dist.converters.legacy_layout import UNEVEN_STAGES

    if source.legacy is not None and source.legacy.args:
        for what in _said_otherwise(source, source.legacy.args):
            logger.warning("%s is in the config.json; the checkpoint's arguments say otherwise, and are kept", what)
        uneven = dict.fromkeys(UNEVEN_STAGES) if pp != source.legacy.pp else {}  # they were for the source's stages
        return {**source.legacy.args, **uneven}
    family, config = source.family, source.hf_config
    args = arguments_of_model(
        family.transformer_config(config), family.gpt_model(config), rope_parameters(family.complete(config))
    )
    for what in _said_otherwise(source, args):
        raise inexpressible(what)
    return args


def _said_otherwise(source: Source, args: Mapping[str, Any]) -> list[str]:
    """Settings of the source's config.json of which arguments say something else, where a config follows from them."""
    from swift_dist.converters.legacy_arguments import config_of_arguments

    try:
        stated = config_of_arguments(args)
    except JobError:  # a model of which they do not say everything, as of latent attention
        return []
    if stated is None:
        return []
    ours, theirs = source.family.complete(source.hf_config), find_family(stated).complete(stated)
    found = []
    if ours["hidden_act"] != theirs["hidden_act"]:
        found.append(f"hidden_act {ours['hidden_act']}")
    mine = rope_parameters(ours)
    # The second comparison takes torch: it is for the same frequencies in other words.
    if mine != rope_parameters(theirs) and source.family.rope(ours) != find_family(stated).rope(theirs):
        found.append(f"RoPE {mine}")
    return found
