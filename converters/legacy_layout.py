"""A new checkpoint in Megatron-LM's legacy format: its files, one a rank, laid out without their values.

What ``torch.save`` of the rank's state dict would write; keys are those of a GPTModel of Transformer Engine's layers.
Transformer Engine's ``_extra_state`` keys (FP8 factors) are left out: Megatron-LM's ``load_model_state_dict`` loads
without them.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from swift_dist.converters.legacy_io import MODEL_FILES, TRACKER
from swift_dist.converters.legacy_side import Grid, Rank, RankSide, grouped_key, tied_copies, whole_to_part
from swift_dist.converters.mapping import Duplicate, Row, TensorMap, box_size, expand
from swift_dist.converters.safetensors_io import FileLayout, Layout, TensorSpec
from swift_dist.converters.stored import ITEM_SIZES, Extent, StoredTensor
from swift_dist.converters.torch_writing import EmptyTensor, archive_layout
from swift_dist.errors import JobError
from swift_dist.parallel import ModelShape

EMBEDDING = "embedding.word_embeddings.weight"
_VOCAB_MULTIPLE = 128  # --make-vocab-size-divisible-by
UNEVEN_STAGES = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
_OTHER_SPLITS = (  # of layers into stages, which the written files do not follow
    *("pipeline_model_parallel_layout", "num_virtual_stages_per_pipeline_rank"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
)

Models = dict[int, dict[str, TensorSpec]]
"""The state dicts of one rank: of each virtual stage, by key."""


@dataclass(frozen=True)
class LegacyTarget:
    """A checkpoint that is going to be written.

    Args:
        layout: its files, paths relative to the target folder.
        side: for plans; names every place that a part is written to.
        other_files: text by name.
    """

    layout: Layout
    side: RankSide
    other_files: Mapping[str, str]


def lay_out_legacy(
    rows: Iterable[Row | Duplicate],
    shape: ModelShape,
    dtypes: Mapping[str, str],
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    vpp: int | None = None,
    etp: int | None = None,
    args: Mapping[str, Any],
    iteration: int | None = None,
) -> LegacyTarget:
    """Lay out a checkpoint.

    Args:
        dtypes: of each Megatron tensor, by global name.
        tp, pp, ep, vpp, etp: tensor, pipeline and expert ranks; model chunks of a pipeline stage; tensor ranks of an
            expert (None: tp).
        args: Megatron-LM's arguments of the model (plain values); those of the layout and the padded vocabulary are set
            here. Read of them: make_vocab_size_divisible_by, moe_grouped_gemm (the experts' names), and
            decoder_first_pipeline_num_layers and decoder_last_pipeline_num_layers.
        iteration: None: a ``release``, as Megatron-LM's converters write.

    Raises:
        JobError: the model does not split so; the key is the argument's name.
    """
    rows = tuple(rows)
    grid = Grid(tp, pp, ep, vpp or 1, etp or tp)
    _check(grid, shape)
    layers = split_layers(shape.num_layers, grid, *(args.get(name) for name in UNEVEN_STAGES))
    multiple = int(args.get("make_vocab_size_divisible_by") or _VOCAB_MULTIPLE) * tp
    padded = -(-shape.vocab_size // multiple) * multiple
    side = RankSide({}, grid, layers, shape.num_experts or 0, written=True, tied=tied_copies(rows))
    models = _models(rows, side, dtypes, padded, grouped=bool(args.get("moe_grouped_gemm")))
    sizes = {"num_layers": shape.num_layers, "num_experts": shape.num_experts, "padded_vocab_size": padded}
    stated = {**args, **sizes, **_layout_arguments(grid, layers, args)}
    folder = "release" if iteration is None else f"iter_{iteration:07d}"
    files, tensors = [], {}
    for rank, chunks in models.items():
        path = f"{folder}/{grid.folder(rank)}/{MODEL_FILES[0]}"
        file, stored = _lay_out_file(path, chunks, grid, rank, stated, iteration)
        files.append(file)
        tensors.update(stored)
    side.tensors = tensors
    return LegacyTarget(
        Layout(tuple(files), tensors), side, {TRACKER: "release" if iteration is None else str(iteration)}
    )


def split_layers(num_layers: int, grid: Grid, first: int | None = None, last: int | None = None) -> list[int]:
    """How many layers each model chunk has, in the order of `Grid.chunks`.

    Args:
        first, last: layers of the first and the last pipeline stage; None: as many as the others
            (``get_num_layers_to_build`` in megatron/core/transformer/transformer_block.py).

    Raises:
        JobError: they do not split evenly.
    """
    even = grid.pp - (first is not None) - (last is not None)
    rest = num_layers - (first or 0) - (last or 0)
    if rest < 0 or even < 0 or (even == 0 and rest) or (even and rest % even):
        raise JobError(
            "pp",
            f"{grid.pp}: {rest} layers cannot be split evenly over {even} pipeline stages",
            "use a divisor of the number of layers",
        )
    stages = [rest // even if even else 0] * grid.pp
    if first is not None:
        stages[0] = first
    if last is not None:
        stages[-1] = last
    if any(count % grid.vpp for count in stages):
        raise JobError(
            "vpp", f"{grid.vpp} does not divide the {max(stages)} layers of a pipeline stage", "use a divisor of it"
        )
    return [stages[stage] // grid.vpp for stage, _ in grid.chunks()]


def _check(grid: Grid, shape: ModelShape) -> None:
    """What megatron-core refuses; see swift_dist/parallel/rules.py, where each rule names its place upstream."""
    for name in ("tp", "pp", "ep", "vpp", "etp"):
        if getattr(grid, name) < 1:
            raise JobError(name, f"{getattr(grid, name)}: must be at least 1", "use a positive number")
    experts, groups = shape.num_experts or 0, shape.num_query_groups
    group_misfit = shape.latent_attention is None and groups % grid.tp and grid.tp % groups
    for wrong, key, message in (
        (shape.num_attention_heads % grid.tp, "tp", f"does not divide {shape.num_attention_heads} attention heads"),
        (group_misfit, "tp", f"is neither a divisor nor a multiple of {groups} key/value heads"),
        (grid.vpp > 1 and grid.pp == 1, "vpp", "needs more than one pipeline stage"),
        (grid.ep > 1 and not experts, "ep", "the model has no experts"),
        (experts % grid.ep, "ep", f"does not divide {experts} experts"),
        (not experts and grid.etp != grid.tp, "etp", "the model has no experts"),
        # Ranks that differ in their expert tensor rank only would write to the same file.
        (grid.tp % grid.etp, "etp", f"does not divide tp {grid.tp}: the legacy format has no files for such ranks"),
    ):
        if wrong:
            raise JobError(key, f"{getattr(grid, key)}: {message}", f"use another {key}")


def _layout_arguments(grid: Grid, layers: list[int], args: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron-LM's arguments of a layout."""
    interleaved = grid.vpp > 1
    return {
        "tensor_model_parallel_size": grid.tp,
        "pipeline_model_parallel_size": grid.pp,
        "virtual_pipeline_model_parallel_size": grid.vpp if interleaved else None,
        "num_layers_per_virtual_pipeline_stage": layers[0] if interleaved and len(set(layers)) == 1 else None,
        "expert_model_parallel_size": grid.ep,
        "expert_tensor_parallel_size": grid.etp,
        "make_vocab_size_divisible_by": args.get("make_vocab_size_divisible_by") or _VOCAB_MULTIPLE,
        **{name: args.get(name) for name in UNEVEN_STAGES},
        **{name: None for name in _OTHER_SPLITS if args.get(name)},
    }


def _models(
    rows: tuple[Row | Duplicate, ...], side: RankSide, dtypes: Mapping[str, str], padded: int, grouped: bool
) -> dict[Rank, Models]:
    """The state dicts of every rank."""
    grid = side.grid
    chunks = grid.chunks()
    models: dict[Rank, Models] = {
        rank: {virtual: {} for stage, virtual in chunks if stage == rank.pp} for rank in grid.ranks()
    }
    tensors = sorted(expand(rows), key=_order)
    owners = {copy.name: owner for owner, copy in side.tied.items()}
    predicts = any(tensor.name.startswith("mtp.") for tensor in tensors)
    for tensor in tensors:
        if tensor.tied_copy and len(chunks) == 1:
            continue  # the only chunk has the embedding itself
        dtype = dtypes[owners.get(tensor.name, tensor.name)]
        size = side.num_parts(tensor)
        try:
            shapes = [
                whole_to_part(tensor, index, size, padded if tensor.padded else None).shape for index in range(size)
            ]
        except ValueError as error:
            raise JobError("tp" if tensor.expert is None else "etp", str(error), "use a smaller one") from None
        key = side.local_key(tensor)
        key = grouped_key(key) if grouped else key
        for chunk in _chunks_of(tensor, side, predicts):
            stage, virtual = chunks[chunk]
            for part, rank in side.holders(tensor, stage):
                models[rank][virtual][key] = TensorSpec(key, shapes[part], dtype)
    return models


def _order(tensor: TensorMap) -> tuple[int, int]:
    """Embedding, layers, the rest: the order of a GPTModel's modules."""
    return (0, 0) if tensor.name == EMBEDDING else (1, tensor.layer) if tensor.layer is not None else (2, 0)


def _chunks_of(tensor: TensorMap, side: RankSide, predicts: bool) -> list[int]:
    """The model chunks that have a tensor (megatron/core/models/gpt/gpt_model.py).

    Multi-token prediction is in the last chunk and has its own copy of the embedding there.
    """
    last = len(side.layers) - 1
    if tensor.layer is not None:
        return [side.chunk_of(tensor.layer)[0]]
    if tensor.name != EMBEDDING:
        return [last]
    return [0, last] if predicts and last else [0]


def _lay_out_file(
    path: str, models: Models, grid: Grid, rank: Rank, args: Mapping[str, Any], iteration: int | None
) -> tuple[FileLayout, dict[str, StoredTensor]]:
    """A rank's file, and the places of its tensors in it."""
    content: dict[str, Any] = {
        "args": Namespace(**args),
        "checkpoint_version": 3.0,
        "iteration": iteration or 0,
    }
    specs: list[tuple[str, TensorSpec]] = []
    for virtual, model in models.items():
        content["model" if grid.vpp == 1 else f"model{virtual}"] = {
            key: EmptyTensor(spec.shape, spec.dtype) for key, spec in model.items()
        }
        specs += [(grid.stored_name(rank, virtual, key), spec) for key, spec in model.items()]
    archive = archive_layout(content)
    tensors = {}
    for (name, spec), (offset, length) in zip(specs, archive.places, strict=True):
        box = tuple((0, extent) for extent in spec.shape)
        assert length == box_size(box) * ITEM_SIZES[spec.dtype], name
        tensors[name] = StoredTensor(name, spec.shape, spec.dtype, (Extent(path, offset, box),))
    return FileLayout(path, archive.size, archive.literals), tensors
