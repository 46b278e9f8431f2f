"""Kernels in the place of parts of transformers' models: the same numbers, the right parts, and back again."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from swift_dist.kernels import slots
from swift_dist.kernels._triton import HAVE_TRITON

EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# architecture -> (norms, rotating attentions, gated MLPs, experts) of two layers, and what else its config says
FAMILIES: dict[str, tuple[tuple[int, int, int, int], dict[str, Any]]] = {
    "llama": ((5, 2, 2, 0), {"mlp_bias": True}),
    "qwen2": ((5, 2, 2, 0), {}),
    "qwen3": ((9, 2, 2, 0), {}),  # queries and keys have norms
    "mistral": ((5, 2, 2, 0), {}),
    "gemma2": ((9, 2, 0, 0), {}),  # 1 + weight; its MLPs are of gelu
    "gemma3_text": ((13, 2, 0, 0), {}),
    "phi3": ((5, 2, 2, 0), {}),  # gate and up are one projection
    "olmo2": ((9, 2, 2, 0), {}),  # rounds after the weight, and rotates in float32
    "glm4": ((9, 0, 2, 0), {}),  # rotates neighbours, not halves
    "cohere2": ((0, 0, 2, 0), {}),  # LayerNorm
    "nemotron": ((0, 2, 0, 0), {"partial_rotary_factor": 0.5}),  # half of each head; relu squared
    "granite": ((5, 2, 2, 0), {"hidden_act": "silu"}),
    "mixtral": ((5, 2, 0, 2), EXPERTS),
    "qwen3_moe": ((9, 2, 0, 2), EXPERTS),
    "gpt_oss": ((5, 0, 0, 0), EXPERTS),  # experts whose gate is clamped
    "glm4_moe": ((5, 2, 2, 1), EXPERTS),  # a part of each head; a dense layer and one of experts, one shared by all
}


def tiny(family: str, **settings: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": torch.float32,
    }
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**values, **settings}))
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms of ones, and biases of zeros, would hide what is left out
                nn.init.normal_(parameter, 0.5 if "norm" in name else 0.0, 0.3)
    return model


def numbers(model: Any, tokens: int = 9) -> dict[str, torch.Tensor]:
    """Logits, and the gradient of every weight that learns."""
    ids = torch.randint(3, 64, (2, tokens), generator=torch.Generator().manual_seed(5))
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    logits.float().log_softmax(-1)[..., 7].sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"": logits.detach(), **gradients}


def held(model: nn.Module) -> dict[str, dict[str, int]]:
    """What every module has of its own, by identity."""
    return {name: {key: id(value) for key, value in vars(module).items()} for name, module in model.named_modules()}


def counts(filled: list[slots.Filled]) -> tuple[int, int, int, int]:
    found = Counter((place.kernel, place.attribute) for place in filled)
    order = [("rms_norm", "forward"), ("rope", "forward"), ("swiglu", "forward"), ("swiglu", "_apply_gate")]
    assert set(found) <= set(order)
    return tuple(found[kind] for kind in order)  # type: ignore[return-value]


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        assert found[name].dtype == right.dtype
        largest = max(1.0, float(right.abs().max()))
        assert float((found[name] - right).abs().max()) <= tolerance * largest, name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_numbers_and_back(family: str) -> None:
    expected, settings = FAMILIES[family]
    model = tiny(family, **settings)
    before, plain = held(model), numbers(model)
    filled = slots.install(model)
    assert counts(filled) == expected
    close(numbers(model), plain)
    slots.undo(filled)
    model.zero_grad()
    assert held(model) == before


@pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed (it has no wheels for this platform)")
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mixtral"])
def test_the_kernels_themselves(family: str) -> None:
    """Under the interpreter."""
    model = tiny(family, **FAMILIES[family][1])
    plain = numbers(model, tokens=4)
    filled = slots.install(model, backend="triton")
    assert counts(filled) == FAMILIES[family][0]
    close(numbers(model, tokens=4), plain)


def test_nothing_beyond_the_model_is_changed() -> None:
    from transformers.models.llama import modeling_llama

    function, norm = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm.forward
    one, other = tiny("llama"), tiny("llama")
    state = torch.get_rng_state()
    slots.install(one)
    assert torch.equal(torch.get_rng_state(), state)
    assert modeling_llama.apply_rotary_pos_emb is function and modeling_llama.LlamaRMSNorm.forward is norm
    assert not any("forward" in vars(module) for module in other.modules())


def test_weights_may_be_anywhere() -> None:
    with torch.device("meta"):
        model = tiny("llama")
    assert counts(slots.install(model)) == FAMILIES["llama"][0]


@pytest.mark.parametrize("precision", ["autocast", "half"])
def test_in_bf16_as_close_as_bf16_is(precision: str) -> None:
    """Dtypes of float32 weights under autocast are those of the model's own code."""
    model = tiny("qwen3") if precision == "autocast" else tiny("qwen3").bfloat16()

    def run() -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            return numbers(model)

    plain = run()
    slots.install(model)
    close(run(), plain, tolerance=0.02)


def test_adapters_before_and_after() -> None:
    """Wrapped projections are called as before; copies of norms that PEFT makes compute with their own weights."""
    from peft import LNTuningConfig, LoraConfig, get_peft_model

    def adapted(kernels: str) -> Any:
        model = tiny("llama")
        if kernels == "before":
            slots.install(model)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(1)
            lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
            model = get_peft_model(get_peft_model(model, LNTuningConfig(target_modules=["norm"])).model, lora)
        for name, parameter in model.named_parameters():
            if "ln_tuning" in name:
                nn.init.normal_(parameter, 1.0, 0.2, generator=torch.Generator().manual_seed(2))
                parameter.requires_grad_(True)
        if kernels == "after":
            assert counts(slots.install(model))[1:] == (2, 2, 0)
        return model

    plain = numbers(adapted("never"))
    assert any("lora" in name for name in plain) and any("ln_tuning" in name for name in plain)
    for order in ("before", "after"):
        close(numbers(adapted(order)), plain)


def test_a_copy_of_a_module_is_its_own() -> None:
    model = tiny("llama")
    slots.install(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    fresh = tiny("llama")
    fresh.load_state_dict(copied.state_dict())
    close(numbers(copied), numbers(fresh))


class Scaled(nn.Module):
    """Looks like a norm of llama's, and is another one."""

    def __init__(self, factor: float = 1.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.factor, self.variance_epsilon = factor, eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (wide * self.factor).to(hidden_states.dtype)


class OwnEps(Scaled):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(hidden_states.dtype)


class Clamped(nn.Module):
    def __init__(self, limit: float | None = None, activation: Any = nn.functional.silu, dropped: float = 0.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.limit, self.activation, self.dropped = limit, activation, dropped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x)
        gate = gate if self.limit is None else gate.clamp(max=self.limit)
        inner = nn.functional.dropout(self.activation(gate) * self.up_proj(x), self.dropped, self.training)
        return self.down_proj(inner)


@pytest.mark.parametrize(
    ("module", "is_filled"),
    [
        (Scaled(), True),
        (Scaled(eps=1e-3), True),
        (Scaled(factor=1.01), False),
        (OwnEps(), False),
        (Clamped(), True),
        (Clamped(limit=10.0), False),
        (Clamped(limit=1000.0), False),
        (Clamped(activation=nn.functional.gelu), False),
        (Clamped(dropped=0.5).eval(), False),  # it may be trained yet
        (nn.RMSNorm(8), False),  # torch's: its eps depends on the dtype
        (nn.LayerNorm(8), False),
    ],
)
def test_what_computes_something_else_is_left_alone(module: nn.Module, is_filled: bool) -> None:
    assert bool(slots.install(nn.Sequential(module))) == is_filled


def test_attributes_of_one_module_of_many_count() -> None:
    filled = slots.install(nn.Sequential(Scaled(), Scaled(factor=2.0), Scaled()))
    assert [place.name for place in filled] == ["0", "2"]
    filled = slots.install(nn.Sequential(Clamped(), Clamped(activation=nn.functional.gelu), Clamped(limit=5.0)))
    assert [place.name for place in filled] == ["0"]


def test_multipliers_of_an_mlp() -> None:
    """Falcon-H1's MLP is llama's where its multipliers are one."""
    from transformers import FalconH1Config
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1MLP

    for multipliers, is_filled in (([1.0, 1.0], True), ([0.5, 1.0], False), ([1.0, 2.0], False)):
        config = FalconH1Config(hidden_size=8, intermediate_size=12, mlp_multipliers=multipliers)
        assert bool(slots.install(FalconH1MLP(config))) == is_filled


def test_what_somebody_else_replaced_is_kept() -> None:
    module = Scaled()
    module.forward = lambda hidden_states: hidden_states  # type: ignore[method-assign]
    mine = module.forward
    assert not slots.install(nn.Sequential(module)) and module.forward is mine


def test_undoing_what_is_covered_says_so() -> None:
    module = Scaled()
    filled = slots.install(nn.Sequential(module))
    module.forward = lambda hidden_states: hidden_states  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"0\.forward is no longer"):
        slots.undo(filled)
