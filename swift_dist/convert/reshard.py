"""`swift-dist convert reshard SRC DST`: a Megatron checkpoint for another layout.

Legacy checkpoints (``mp_rank_*``) become torch_dist, which any layout loads, or legacy files of other degrees;
torch_dist becomes legacy files where a program wants those. torch_dist itself needs no resharding.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from swift_dist.convert.companions import companions, write_companions
from swift_dist.convert.conversion import Conversion, Target
from swift_dist.convert.hf_to_megatron import dist_target
from swift_dist.convert.options import ConvertOptions
from swift_dist.convert.report import render_conversion
from swift_dist.convert.sources import HF_SUBFOLDER, Source, open_source
from swift_dist.converters.plan import megatron_dtypes
from swift_dist.converters.stored import BY_OPTION
from swift_dist.converters.target_folder import check_target
from swift_dist.errors import JobError

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
    check_target(Path(options.target))
    degrees = {name: getattr(options, name) for name in _DEGREES if getattr(options, name) is not None}
    wanted = options.format or ("legacy" if degrees else "torch_dist")
    if wanted == "torch_dist" and degrees:
        name = next(iter(degrees))
        raise JobError(name, "a torch_dist checkpoint has no degrees: any layout loads it", f"leave out --{name}")
    source = open_source(options.source, options.hf_config)
    if source.kind == "hf":
        raise JobError("source", f"{options.source} is a Hugging Face folder", "use convert hf-to-megatron")
    if source.kind == wanted == "torch_dist":
        raise JobError("source", f"{options.source} is torch_dist already: any layout loads it", "use it as it is")
    target = dist_target(source, options) if wanted == "torch_dist" else _legacy_target(source, options, degrees)
    return Conversion("reshard", options, source, target, began).run()


def _legacy_target(source: Source, options: ReshardOptions, degrees: dict[str, int]) -> Target:
    from swift_dist.converters.legacy_layout import lay_out_legacy

    wanted = BY_OPTION[options.dtype] if options.dtype else None
    made = lay_out_legacy(
        source.rows,
        source.family.shape(source.hf_config),
        megatron_dtypes(source.rows, source.side, wanted),
        args=_arguments(source),
        iteration=source.record.get("step"),
        **degrees,
    )
    files = companions(source)

    def finish(folder: Path) -> list[str]:
        for name, text in made.other_files.items():
            (folder / name).write_text(text)
        written = write_companions(folder / HF_SUBFOLDER, source, files, None, complete=False)
        return [*made.other_files, *(f"{HF_SUBFOLDER}/{name}" for name in written)]

    names = [*made.other_files, *(f"{HF_SUBFOLDER}/{name}" for name in (*files, "config.json"))]
    return Target("legacy", made.layout, made.side, {"degrees": degrees}, finish, names)


def _arguments(source: Source) -> dict[str, Any]:
    """Megatron-LM's arguments for the written files: the source's own, or those of its model."""
    if source.legacy is not None and source.legacy.args:
        return dict(source.legacy.args)
    from swift_dist.converters.legacy_arguments import arguments_of_model
    from swift_dist.models import rope_parameters

    family, config = source.family, source.hf_config
    return arguments_of_model(
        family.transformer_config(config), family.gpt_model(config), rope_parameters(family.complete(config))
    )
