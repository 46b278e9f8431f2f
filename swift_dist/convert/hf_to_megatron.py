"""`swift-dist convert hf-to-megatron SRC DST`: a Hugging Face folder becomes a torch_dist checkpoint.

Megatron loads it at any layout. No model object, no GPU, no process group: bytes are copied by a plan that follows from
the files' headers.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pydantic import Field

from swift_dist.convert.adapters import with_adapter, write_adapter_config
from swift_dist.convert.companions import companions, write_companions
from swift_dist.convert.conversion import Conversion, Target
from swift_dist.convert.options import ConvertOptions, refuse_unread
from swift_dist.convert.report import render_conversion
from swift_dist.convert.sources import ADAPTER_CONFIG, HF_SUBFOLDER, Source, open_source, read_config
from swift_dist.converters.dist_index import DistSide
from swift_dist.converters.plan import megatron_dtypes
from swift_dist.converters.safetensors_io import parse_size
from swift_dist.converters.stored import BY_OPTION
from swift_dist.converters.target_folder import check_target
from swift_dist.errors import JobError

render = render_conversion


class HFToMegatronOptions(ConvertOptions):
    source: str = Field(description="Hugging Face model folder (safetensors, or .bin), or a folder of a PEFT adapter")
    target: str = Field(description="torch_dist checkpoint to write; must not exist")
    adapter: str | None = Field(None, description="PEFT adapter to merge into the weights")
    base: str | None = Field(
        None, description="folder of the model that an adapter is for (default: what its adapter_config.json names)"
    )


def run(options: HFToMegatronOptions) -> dict[str, Any]:
    """Convert, or with ``dry_run`` only plan. Goes on where an interrupted run of the same command was.

    Returns:
        what `Conversion.summary` and `Conversion.run` say.

    Raises:
        JobError: source, target or config are wrong; nothing was written.
        RunError: reading or writing failed; the same command goes on with the files that are whole.
    """
    began = time.monotonic()
    refuse_unread(options)
    check_target(Path(options.target))
    if options.base and options.hf_config:
        raise JobError("base", "and hf_config both name a config.json", "give one of them")
    if options.base:
        read_config(Path(options.base), "base")
    source = open_source(options.source, options.base or options.hf_config, adapters=True)
    if source.kind not in ("hf", "peft"):
        raise JobError(
            "source", f"{options.source} is a {source.kind} checkpoint", "use convert megatron-to-hf or reshard"
        )
    if options.base and source.lora is None:
        raise JobError("base", f"{options.source} is a model, not an adapter", "leave out --base")
    source = with_adapter(source, options.adapter)
    return Conversion("hf-to-megatron", options, source, dist_target(source, options), began).run()


def dist_target(source: Source, options: ConvertOptions) -> Target:
    """A torch_dist checkpoint of a source's weights."""
    from swift_dist.converters.dist_layout import dist_specs, lay_out_dist, write_common, write_index

    wanted = BY_OPTION[options.dtype] if options.dtype else None
    dtypes = megatron_dtypes(source.rows, source.side, wanted)
    layout = lay_out_dist(dist_specs(source.rows, dtypes), parse_size(options.max_shard_size))
    files = companions(source)
    step = source.record.get("step") or 0

    def finish(folder: Path) -> list[str]:
        names = [*write_index(folder, layout), write_common(folder, {"iteration": step})]
        written = write_companions(folder / HF_SUBFOLDER, source, files, wanted, complete=False)
        if source.lora is not None:
            written.append(write_adapter_config(folder / HF_SUBFOLDER, source))
        return names + [f"{HF_SUBFOLDER}/{name}" for name in written]

    names = [".metadata", "common.pt", "metadata.json", *(f"{HF_SUBFOLDER}/{name}" for name in (*files, "config.json"))]
    if source.lora is not None:
        names.append(f"{HF_SUBFOLDER}/{ADAPTER_CONFIG}")
    return Target("torch_dist", layout, DistSide(layout.tensors), {}, finish, names)
