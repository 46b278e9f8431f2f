"""`swift-dist convert megatron-to-hf SRC DST`: a Megatron checkpoint becomes a Hugging Face model folder.

Reads torch_dist (ours and Megatron-LM's) and legacy checkpoints. No process group, no model object, no GPU.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pydantic import Field

from swift_dist.convert.adapters import peft_target, with_adapter
from swift_dist.convert.companions import GENERATION, companions, write_companions
from swift_dist.convert.conversion import Conversion, Target
from swift_dist.convert.options import ConvertOptions, refuse_unread
from swift_dist.convert.report import render_conversion
from swift_dist.convert.sources import Source, open_source
from swift_dist.convert.special_tokens import with_special_ids
from swift_dist.converters.mapping import hf_shapes
from swift_dist.converters.plan import HFSide, hf_dtypes, megatron_dtypes, repeated_names
from swift_dist.converters.safetensors_io import INDEX_NAME, TensorSpec, index_text, lay_out, parse_size, plan_shards
from swift_dist.converters.stored import BY_OPTION, natural
from swift_dist.converters.target_folder import check_target
from swift_dist.errors import JobError

render = render_conversion


class MegatronToHFOptions(ConvertOptions):
    source: str = Field(description="run folder, its checkpoints folder, or one checkpoint (torch_dist or mp_rank_*)")
    target: str = Field(description="Hugging Face folder to write; must not exist")
    adapter: str | None = Field(
        None, description="PEFT adapter to merge into the weights; SOURCE may be a Hugging Face folder then"
    )
    tokenizer: str | None = Field(None, description="tokenizer folder to add (default: the run's model.tokenizer)")


def run(options: MegatronToHFOptions) -> dict[str, Any]:
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
    source = open_source(options.source, options.hf_config, adapters=True)
    if source.kind == "peft" or (source.kind == "hf" and options.adapter is None):
        raise JobError("source", f"{options.source} is a Hugging Face folder already", "name a Megatron checkpoint")
    source = with_adapter(source, options.adapter)
    is_model = source.lora is None
    target = hf_target(source, options) if is_model else peft_target(source, options, options.tokenizer)
    return Conversion("megatron-to-hf", options, source, target, began).run()


def hf_target(source: Source, options: MegatronToHFOptions) -> Target:
    """A Hugging Face folder of a source's weights."""
    wanted = BY_OPTION[options.dtype] if options.dtype else None
    dtypes = hf_dtypes(source.rows, megatron_dtypes(source.rows, source.side, wanted))
    specs = [TensorSpec(name, shape, dtypes[name]) for name, shape in hf_shapes(source.rows).items()]
    shards = plan_shards(sorted(specs, key=lambda spec: _order(spec.name)), parse_size(options.max_shard_size))
    layout, index = lay_out(shards), index_text(shards)
    files = companions(source, options.tokenizer)
    with_special_ids(source.hf_config, files)  # a tokenizer that cannot be read is found before anything is written
    used = {spec.dtype for spec in specs}
    common = used.pop() if len(used) == 1 else wanted or "F32"

    def finish(folder: Path) -> list[str]:
        names = write_companions(folder, source, files, common, complete=True)
        if index is not None:
            (folder / INDEX_NAME).write_text(index, encoding="utf-8")
            names.append(INDEX_NAME)
        return names

    names = sorted({"config.json", GENERATION, *files, *([INDEX_NAME] if index else [])})
    side = HFSide(layout.tensors, repeated_names(source.rows, layout.tensors))
    return Target("hf", layout, side, {"tokenizer": options.tokenizer}, finish, names)


def _order(name: str) -> tuple[int, Any]:
    """The embedding before the layers, and they before what comes last in the model."""
    return 0 if name.startswith("model.embed") else 1 if ".layers." in name else 2, natural(name)
