"""Ranks that share one long row: the most bytes that its forward and backward pass needs on each of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import ranks
import torch
from live_bytes import messages_apart, outside, peak_bytes

from swift_dist.engines.hf import attention
from swift_dist.engines.hf import offload as host
from swift_dist.engines.hf.batches import Forward, prepare
from swift_dist.engines.hf.tiled_mlp import install as tile_mlps
from swift_dist.sequence_parallel import attention as shared_attention
from swift_dist.sequence_parallel.degrees import Degrees
from swift_dist.sequence_parallel.group import make_groups

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}


def row(lengths: list[int]) -> dict[str, torch.Tensor]:
    """A packed micro-batch all of whose tokens learn, as the data room lays it out."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, SIZES["vocab_size"], (1, sum(lengths)), generator=generator)
    counts = torch.tensor(lengths)
    return {
        "tokens": tokens,
        "labels": tokens.roll(-1),
        "weights": torch.ones(tokens.shape),
        "segments": torch.arange(len(lengths)).repeat_interleave(counts)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "lengths": counts,
        "sample_weights": torch.ones(len(lengths)),
    }


def measure(worker: Any, cases: list[dict[str, Any]], lengths: list[int], ring: bool = False) -> list[int]:
    """Bytes of each case (see `_peak`)."""
    torch.set_num_threads(1)
    world = worker.world_size
    with ranks.joined(worker):
        sharing = make_groups(Degrees(1, world) if ring else Degrees(world, 1), worker.rank, world)
        return [_peak(lengths, sharing if world > 1 else None, **case) for case in cases]


def _peak(
    lengths: list[int],
    sharing: Any,
    recompute: bool = False,
    offload: bool = False,
    tiled_loss: bool = False,
    tiled_mlp: bool = False,
    dtype: str = "float32",
    sizes: dict[str, int] | None = None,
) -> int:
    """Of a model whose activations have this dtype, all of whose weights learn."""
    model = ranks.tiny(**{**SIZES, **(sizes or {})}).to(getattr(torch, dtype)).train()
    attention.register()
    shared_attention.register(attention.attend_whole_rows)
    model.set_attn_implementation(attention.NAME if sharing is None else shared_attention.NAME)
    if recompute:
        model.activation_checkpointing_enable()
    forward = Forward(model, "tokens", tiled=tiled_loss)
    if tiled_mlp:
        tile_mlps(model)
    if offload:
        host.install(model, torch.device("cpu"))

    def passes(lengths: list[int]) -> None:
        prepared = prepare(row(lengths), torch.device("cpu"), "tokens", sharing)
        batch = forward(model, prepared)
        assert batch.logps is not None
        (batch.logps * batch.weights).sum().neg().backward()

    with _host_apart(), messages_apart():
        passes([128])  # the weights' gradients are there from here on
        return peak_bytes(lambda: passes(lengths))


@contextlib.contextmanager
def _host_apart() -> Iterator[None]:
    """The host's memory is somebody else's, and comes back as a copy, as on a GPU."""
    host_like, set_out = host.host_like, host._Held.set_out

    def copied(held: Any) -> None:
        if held._back is None:
            held._back = held._host.clone()

    host.host_like, host._Held.set_out = outside, copied  # type: ignore[method-assign]
    try:
        yield
    finally:
        host.host_like, host._Held.set_out = host_like, set_out  # type: ignore[method-assign]
