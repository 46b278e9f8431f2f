"""Legacy checkpoints as Megatron-LM writes them, made by hand: torch.save of state dicts cut out of a Hugging Face
model's tensors, knowing nothing of the package's mappings and layouts. Sources: legacy_upstream.md."""

from __future__ import annotations

import io
from argparse import Namespace
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

DIVISIBLE_BY = 8  # make_vocab_size_divisible_by


class AttnBackend(Enum):
    """An enumeration among the arguments, as megatron's of that name."""

    flash = 1


@dataclass(frozen=True)
class Cut:
    """A parallel layout. `stages`: layers of each model chunk: of every pipeline stage's first one, then second ones.
    `grouped`: experts are named as TEGroupedMLP has them, else as SequentialMLP. `local`: norms are named as without
    Transformer Engine."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    vpp: int = 1
    etp: int | None = None
    stages: tuple[int, ...] = (4,)
    grouped: bool = False
    local: bool = False

    @property
    def expert_tp(self) -> int:
        return self.etp or self.tp

    def ranks(self) -> list[tuple[int, int, int]]:
        """(tensor, pipeline, expert) ranks of a world that is large enough, as parallel_state numbers them."""
        size = self.tp * self.ep * self.expert_tp
        pairs = {(rank % self.tp, rank // self.expert_tp % self.ep) for rank in range(size)}
        return [(tp, pp, ep) for tp, ep in sorted(pairs) for pp in range(self.pp)]

    def folder(self, tp: int, pp: int, ep: int) -> str:
        name = f"mp_rank_{tp:02d}"
        name += f"_{pp:03d}" if self.pp > 1 else ""
        return name + (f"_{ep:03d}" if self.ep > 1 else "")


def gated(gate: torch.Tensor, up: torch.Tensor, part: int, parts: int) -> torch.Tensor:
    return torch.cat([gate.chunk(parts)[part], up.chunk(parts)[part]])


def qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hf: dict[str, Any], part: int, parts: int) -> torch.Tensor:
    """Group by group: its query heads, its key head, its value head. Whole groups on each rank."""
    groups = hf["num_key_value_heads"]
    grouped = [torch.cat(rows) for rows in zip(q.chunk(groups), k.chunk(groups), v.chunk(groups), strict=True)]
    own = groups // parts
    return torch.cat(grouped[part * own : (part + 1) * own])


def vocabulary(matrix: torch.Tensor, part: int, parts: int) -> torch.Tensor:
    multiple = DIVISIBLE_BY * parts
    rows = (len(matrix) + multiple - 1) // multiple * multiple
    return torch.cat([matrix, matrix.new_zeros(rows - len(matrix), matrix.shape[1])]).chunk(parts)[part]


def layer_state(
    hf: dict[str, Any], tensors: dict[str, torch.Tensor], layer: int, cut: Cut, tp: int, ep: int
) -> dict[str, torch.Tensor]:
    """A layer on one rank, keys without ``decoder.layers.<n>.``."""
    source = f"model.layers.{layer}."
    q, k, v, out = (tensors[f"{source}self_attn.{name}_proj.weight"] for name in "qkvo")
    before_mlp = "pre_mlp_layernorm.weight" if cut.local else "mlp.linear_fc1.layer_norm_weight"
    state = {
        "self_attention.linear_proj.weight": out.chunk(cut.tp, dim=1)[tp],
        "input_layernorm.weight" if cut.local else "self_attention.linear_qkv.layer_norm_weight": tensors[
            f"{source}input_layernorm.weight"
        ],
        "self_attention.linear_qkv.weight": qkv(q, k, v, hf, tp, cut.tp),
    }
    if f"{source}self_attn.q_norm.weight" in tensors:
        for name in "qk":
            state[f"self_attention.{name}_layernorm.weight"] = tensors[f"{source}self_attn.{name}_norm.weight"]
    norm = tensors[f"{source}post_attention_layernorm.weight"]
    if f"{source}mlp.gate_proj.weight" in tensors:
        gate, up, down = (tensors[f"{source}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        state[before_mlp] = norm
        state["mlp.linear_fc1.weight"] = gated(gate, up, tp, cut.tp)
        state["mlp.linear_fc2.weight"] = down.chunk(cut.tp, dim=1)[tp]
        return state
    state["pre_mlp_layernorm.weight"] = norm
    state["mlp.router.weight"] = tensors[f"{source}mlp.gate.weight"]
    own, part = hf["num_experts"] // cut.ep, tp % cut.expert_tp
    for local in range(own):
        expert = f"{source}mlp.experts.{ep * own + local}."
        gate, up, down = (tensors[f"{expert}{name}_proj.weight"] for name in ("gate", "up", "down"))
        values = {"linear_fc1": gated(gate, up, part, cut.expert_tp)}
        values["linear_fc2"] = down.chunk(cut.expert_tp, dim=1)[part]
        for name, value in values.items():
            key = f"{name}.weight{local}" if cut.grouped else f"local_experts.{local}.{name}.weight"
            state[f"mlp.experts.{key}"] = value
    return state


def model_states(
    hf: dict[str, Any], tensors: dict[str, torch.Tensor], cut: Cut, tp: int, pp: int, ep: int
) -> list[dict[str, torch.Tensor]]:
    """The state dicts of a rank's model chunks."""
    tied = hf["tie_word_embeddings"]
    embedding = tensors["model.embed_tokens.weight"]
    chunks = []
    for virtual in range(cut.vpp):
        number = virtual * cut.pp + pp
        state: dict[str, torch.Tensor] = {}
        if number == 0:
            state["embedding.word_embeddings.weight"] = vocabulary(embedding, tp, cut.tp)
        first = sum(cut.stages[:number])
        for local in range(cut.stages[number]):
            found = layer_state(hf, tensors, first + local, cut, tp, ep)
            state.update({f"decoder.layers.{local}.{key}": value for key, value in found.items()})
        if number == cut.pp * cut.vpp - 1:
            state["decoder.final_layernorm.weight"] = tensors["model.norm.weight"]
            if not tied or number:
                head = embedding if tied else tensors["lm_head.weight"]
                state["output_layer.weight"] = vocabulary(head, tp, cut.tp)
        chunks.append({key: value.clone().contiguous() for key, value in state.items()})
    return chunks


def arguments(hf: dict[str, Any], cut: Cut) -> Namespace:
    """Some of Megatron-LM's arguments, with values that are not plain among them."""
    multiple = DIVISIBLE_BY * cut.tp
    found = {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "group_query_attention": True,
        "num_query_groups": hf["num_key_value_heads"],
        "kv_channels": hf["head_dim"],
        "max_position_embeddings": hf["max_position_embeddings"],
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "normalization": "RMSNorm",
        "norm_epsilon": hf["rms_norm_eps"],
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": "num_experts" in hf,
        "untie_embeddings_and_output_weights": not hf["tie_word_embeddings"],
        "vocab_size": None,
        "padded_vocab_size": (hf["vocab_size"] + multiple - 1) // multiple * multiple,
        "make_vocab_size_divisible_by": DIVISIBLE_BY,
        "tensor_model_parallel_size": cut.tp,
        "pipeline_model_parallel_size": cut.pp,
        "expert_model_parallel_size": cut.ep,
        "expert_tensor_parallel_size": cut.expert_tp,
        "params_dtype": torch.float32,
        "attention_backend": AttnBackend.flash,
        "device": torch.device("cpu"),
        "data_path": ["a", "b"],
    }
    if "num_experts" in hf:
        found |= {"num_experts": hf["num_experts"], "moe_router_topk": hf["num_experts_per_tok"]}
        found |= {"moe_ffn_hidden_size": hf["moe_intermediate_size"], "moe_router_pre_softmax": False}
        found["moe_layer_freq"] = [int(layer not in hf["mlp_only_layers"]) for layer in range(hf["num_hidden_layers"])]
    return Namespace(**found)


def write(folder: Path, hf: dict[str, Any], tensors: dict[str, torch.Tensor], cut: Cut, with_args: bool = True) -> Path:
    """Write the checkpoint of iteration 100. Returns its folder."""
    checkpoint = folder / "iter_0000100"
    for tp, pp, ep in cut.ranks():
        path = checkpoint / cut.folder(tp, pp, ep) / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        content: dict[str, Any] = {"args": arguments(hf, cut) if with_args else None}
        content |= {"checkpoint_version": 3.0, "iteration": 100}
        for virtual, state in enumerate(model_states(hf, tensors, cut, tp, pp, ep)):
            extra: dict[str, Any] = {}
            for key, value in state.items():
                extra[key] = value
                if key.endswith("linear_qkv.weight"):
                    extra[key.replace("weight", "_extra_state")] = io.BytesIO(b"fp8")
                if key.endswith("linear_proj.weight"):
                    extra[key.replace("weight", "_extra_state")] = torch.empty(0, dtype=torch.uint8)
            content["model" if cut.vpp == 1 else f"model{virtual}"] = extra
        content["optimizer"] = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}
        content["rng_state"] = [{"torch_rng_state": torch.get_rng_state(), "np_rng_state": ("MT19937", b"\0" * 8)}]
        torch.save(content, path)
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    return checkpoint
