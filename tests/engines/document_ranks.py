"""Ranks of the tests of core attention on samples of several documents, split over the context-parallel ranks."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))

import golden_cases as golden
import torch

from swift_dist.kernels.zigzag import parts_of
from swift_dist.parallel import ParallelLayout

NO_DROPOUT, TINY_DROPOUT = 0.0, 1e-15
"""Attention with dropout goes another way; of so little of it nothing is dropped."""


def formula(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[list[int]] | None, window: int | None
) -> torch.Tensor:
    """[S, b, n, d], [S, b, g, d] -> [S, b, n*d]: softmax over the keys of the same document that the query sees."""
    length, batch, heads, _ = query.shape
    key, value = (tensor.repeat_interleave(heads // tensor.shape[2], dim=2) for tensor in (key, value))
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) / math.sqrt(query.shape[-1])
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance <= (length if window is None else window))
    seen = seen.expand(batch, length, length).clone()
    for sample, documents in enumerate(lengths or []):
        number = torch.arange(len(documents)).repeat_interleave(torch.tensor(documents))
        seen[sample] &= number[:, None] == number
    probs = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1)
    return torch.einsum("bnst,tbnd->sbnd", probs, value).flatten(2)


def compare(worker: Any, cases: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Of each case {"lengths", "length", "window", "dropout"}: largest differences of the output and of the gradients
    of queries, keys and values, on this rank's tokens of two samples; and the bytes that are kept for backward."""
    from megatron.core import parallel_state
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from swift_dist.engines.megatron import groups, rng
    from swift_dist.engines.megatron.attention import DotProductAttention, documents_of

    torch.set_num_threads(1)
    layout = ParallelLayout(world_size=worker.world_size, cp=worker.world_size)
    groups.join(layout, worker, 60)
    try:
        rng.seed_generators(1, layout, worker.rank)
        collection = SimpleNamespace(cp=parallel_state.get_context_parallel_group())
        found = []
        for case in cases:
            window, lengths = case["window"], case["lengths"]
            config = TransformerConfig(
                num_layers=1,
                hidden_size=32,
                num_attention_heads=4,
                num_query_groups=2,
                attention_dropout=case["dropout"],
                context_parallel_size=layout.cp,
                window_size=None if window is None else (window, 0),
            )
            core = DotProductAttention(config, 1, AttnMaskType.causal, "self", pg_collection=collection)
            documents = None
            if lengths is not None:
                positions = [torch.cat([torch.arange(n) for n in sample]) for sample in lengths]
                documents = documents_of(torch.stack(positions))
            found.append(_differences(core, case["length"], lengths, documents, window, worker.rank, layout.cp))
        return found
    finally:
        groups.leave()


def _differences(
    core: Any, length: int, lengths: Any, documents: Any, window: int | None, rank: int, ranks: int
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(length, 2, heads, 8) for heads in (4, 2, 2)]
    whole = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    weight = torch.randn((length, 2, 32), dtype=torch.float64, generator=generator)
    mine = torch.cat([torch.arange(begin, end) for _, begin, end in parts_of(length, ranks, rank)])
    ours = [tensor[mine].clone().requires_grad_() for tensor in whole]
    theirs = [tensor.clone().requires_grad_() for tensor in whole]
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = core(*ours, documents)
    expected = formula(*theirs, lengths, window)
    (output * weight[mine]).sum().backward()
    (expected * weight).sum().backward()
    found = {"kept": sum(kept.values()), "output": float((output - expected[mine]).detach().abs().max())}
    for name, got, right in zip(("query", "key", "value"), ours, theirs, strict=True):
        found[name] = float((got.grad - right.grad[mine]).abs().max())
    return found


def beside_transformer_engine(worker: Any, separate_documents: bool) -> tuple[str, bool]:
    """The core attention that a GPU with transformer-engine would run, and whether its rotation would be that
    library's, as far as a machine without it can tell."""
    from swift_dist.config import JobConfig
    from swift_dist.engines.megatron import groups, settings, spec
    from swift_dist.models import find_family

    class Theirs(spec.TorchBackend):
        def core_attention(self) -> type:
            return Theirs

    fused: list[bool] = []

    def fusions(on_cuda: bool, te: bool) -> dict[str, Any]:  # megatron looks for them in transformer-engine itself
        fused.append(on_cuda and te)
        return {}

    spec.backend = Theirs
    settings.have_transformer_engine, settings._fusions = lambda: True, fusions
    job = golden.job("llama", "CP2")
    job["data"]["separate_documents"] = separate_documents
    config = job["model"]["config"]
    groups.join(ParallelLayout(world_size=1), worker, 60)
    try:
        made = settings.transformer_config(
            JobConfig.model_validate(job), golden.layout("CP2"), find_family(config), config, "cuda:0"
        )
        layer = spec.block_spec(made, None, separate_documents).layer_specs[0]
        return layer.submodules.self_attention.submodules.core_attention.__name__, fused[0]
    finally:
        groups.leave()
