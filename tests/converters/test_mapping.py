from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from swift_dist.converters.mapping import (
    QKV,
    Direct,
    Embedding,
    Experts,
    GatedMLP,
    checkpoint_key,
    duplicates,
    expand,
    global_name,
    hf_shapes,
    slices,
)


def test_rows_name_every_hugging_face_tensor_with_its_shape(saved: Any) -> None:
    assert hf_shapes(saved.rows) == {name: tuple(tensor.shape) for name, tensor in saved.tensors.items()}


def test_there_and_back_is_bit_exact(saved: Any, whole: dict[str, torch.Tensor]) -> None:
    back = {name: torch.full(shape, float("nan")) for name, shape in hf_shapes(saved.rows).items()}
    for tensor in expand(saved.rows):
        if not tensor.tied_copy:
            for piece in tensor.pieces:
                assert back[piece.hf][slices(piece.hf_box)].isnan().all(), f"{piece.hf} is written twice"
                back[piece.hf][slices(piece.hf_box)] = whole[tensor.name][slices(piece.megatron_box)]
    back |= {row.hf: back[row.of] for row in duplicates(saved.rows) if row.required}
    for name, values in saved.tensors.items():
        assert torch.equal(back[name], values), name


def test_pieces_cover_every_megatron_element_once(saved: Any) -> None:
    for tensor in expand(saved.rows):
        counts = torch.zeros(tensor.shape, dtype=torch.int32)
        for piece in tensor.pieces:
            counts[slices(piece.megatron_box)] += 1
        assert (counts == 1).all(), tensor.name


def test_qkv_is_interleaved_as_megatron_reads_it(saved: Any, whole: dict[str, torch.Tensor]) -> None:
    """Megatron views its rows as [groups, heads per group + 2, head_dim] and splits the middle axis."""
    shape = saved.family.shape(saved.hf)
    if shape.latent_attention:
        assert not any(isinstance(row, QKV) for row in saved.rows)
        return
    heads = shape.num_attention_heads // shape.num_query_groups
    for layer in range(shape.num_layers):
        stored = whole[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"]
        grouped = stored.view(shape.num_query_groups, heads + 2, shape.head_dim, shape.hidden_size)
        for part, index in (("q", slice(0, heads)), ("k", slice(heads, heads + 1)), ("v", slice(heads + 1, None))):
            expected = saved.tensors[f"model.layers.{layer}.self_attn.{part}_proj.weight"]
            assert torch.equal(grouped[:, index].reshape(-1, shape.hidden_size), expected)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_ranks_parts_make_up_the_whole(saved: Any, whole: dict[str, torch.Tensor], size: int) -> None:
    """Against megatron's definition, written out here: dimension 0 or 1 in equal parts, a gated fc1 gate and up apart.

    Size 8 is more than any tiny model has key-value groups: a rank then holds part of a group.
    """
    for tensor in expand(saved.rows):
        values, padded_rows = whole[tensor.name], None
        if tensor.padded:
            padded_rows = 64 * size
            values = torch.cat([values, torch.zeros(padded_rows - len(values), values.shape[1])])
        for rank in range(size):
            part = tensor.shard(rank, size, padded_rows)
            got = torch.zeros(part.shape)
            for piece in part.pieces:
                got[slices(piece.megatron_box)] = saved.tensors[piece.hf][slices(piece.hf_box)]
            assert torch.equal(got, _megatron_part(tensor.name, values, rank, size)), f"{tensor.name} rank {rank}"


def _megatron_part(name: str, values: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    if re.search(r"linear_fc1\.(weight|bias)$", name):
        gate, up = values.chunk(2)
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
    latent = r"linear_q_proj\.weight$|linear_(q|kv)_up_proj\.weight$|eh_proj"
    if re.search(r"linear_qkv\.(weight|bias)$|embedding|output_layer|" + latent, name):
        return values.chunk(size)[rank]
    if re.search(r"linear_(proj|fc2)\.weight$", name):
        return values.chunk(size, dim=1)[rank]
    return values


def test_shard_refuses_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match="does not split into 2 x 4"):
        GatedMLP("fc1", ("gate", "up"), 6, 3).at(None).shard(0, 4)
    with pytest.raises(ValueError, match="cannot be padded to 5"):
        Embedding("embedding", "embed", 7, 3).at().shard(0, 1, padded_rows=5)
    with pytest.raises(ValueError, match="cannot be padded"):
        Direct("a", "b", (4,)).at(None).shard(0, 1, padded_rows=8)


def test_hf_shapes_refuses_rows_that_leave_a_hole() -> None:
    rows = (QKV("qkv", ("q", "k", "v"), 4, 2, 8, 16), QKV("other", ("q", "k2", "v2"), 2, 2, 8, 16))
    with pytest.raises(ValueError, match="do not cover q exactly once"):
        hf_shapes(rows)


def test_expand_yields_only_the_layers_and_experts_asked_for() -> None:
    rows = (
        Direct("decoder.layers.{layer}.norm", "l.{layer}.norm", (4,), layers=(0, 1, 2)),
        Experts(Direct("d.{layer}.local_experts.{expert}.w", "l.{layer}.e.{expert}", (4, 4), layers=(1, 2)), 4),
        Direct("final", "norm", (4,)),
    )
    names = [tensor.name for tensor in expand(rows, layers={1}, experts=(2, 3))]
    assert names == ["decoder.layers.1.norm", "d.1.local_experts.2.w", "d.1.local_experts.3.w", "final"]
    assert len(list(expand(rows))) == 3 + 2 * 4 + 1


@pytest.mark.parametrize(
    ("live", "expected"),
    [
        ("decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.4.mlp.linear_fc1.weight"),
        (
            "decoder.layers.1.mlp.experts.local_experts.2.linear_fc2.weight",
            "decoder.layers.5.mlp.experts.local_experts.10.linear_fc2.weight",
        ),
        (
            "decoder.layers.1.mlp.experts.linear_fc1.weight3",
            "decoder.layers.5.mlp.experts.local_experts.11.linear_fc1.weight",
        ),
        ("decoder.final_layernorm.weight", "decoder.final_layernorm.weight"),
        ("mtp.layers.0.enorm.weight", "mtp.layers.0.enorm.weight"),
        (
            "mtp.layers.0.transformer_layer.mlp.experts.linear_fc2.weight3",
            "mtp.layers.0.transformer_layer.mlp.experts.local_experts.11.linear_fc2.weight",
        ),
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
    ],
)
def test_global_name(live: str, expected: str) -> None:
    assert global_name(live, layer_offset=4, expert_offset=8) == expected


def test_checkpoint_key() -> None:
    name = "decoder.layers.5.mlp.experts.local_experts.10.linear_fc1.weight"
    assert checkpoint_key(name) == ("decoder.layers.5.mlp.experts.experts.linear_fc1.weight", 10)
    assert checkpoint_key("output_layer.weight") == ("output_layer.weight", None)
    name = "mtp.layers.0.transformer_layer.mlp.experts.local_experts.3.linear_fc1.weight"
    assert checkpoint_key(name) == ("mtp.layers.0.transformer_layer.mlp.experts.experts.linear_fc1.weight", 3)


def test_parameter_counts_add_up(saved: Any) -> None:
    """Layers after the last one (multi-token prediction) are not counted."""
    after = f"model.layers.{saved.hf['num_hidden_layers']}."
    counts = [math.prod(shape) for name, shape in hf_shapes(saved.rows).items() if not name.startswith(after)]
    assert sum(counts) == saved.family.shape(saved.hf).num_parameters()
