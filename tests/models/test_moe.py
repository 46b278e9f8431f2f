"""Routing and auxiliary loss: megatron's functions with our arguments against transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from swift_dist.models import find_family

FAMILY = find_family({"model_type": "qwen3_moe"})
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.02,
}


@pytest.mark.parametrize("normalise", [True, False])
def test_routing_equals_transformers(normalise: bool) -> None:
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeTopKRouter

    keys = SIZES | {"norm_topk_prob": normalise}
    router = Qwen3MoeTopKRouter(Qwen3MoeConfig(**keys))
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight)
    logits, weights, experts = router(torch.randn(50, 16))
    config = FAMILY.transformer_config(keys)
    probs, chosen = topk_routing_with_score_function(
        logits,
        config["moe_router_topk"],
        use_pre_softmax=config["moe_router_pre_softmax"],
        score_function=config["moe_router_score_function"],
    )
    expected = torch.zeros_like(probs).scatter(1, experts, weights)
    torch.testing.assert_close(probs, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(chosen, expected > 0)


def losses(layers: list[torch.Tensor]) -> tuple[float, float]:
    """(transformers', megatron's) auxiliary loss of these router logits, coefficients included."""
    from megatron.core.transformer.moe.moe_utils import (
        compute_routing_scores_for_aux_loss,
        switch_load_balancing_loss_func,
    )
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    top_k, num_experts = SIZES["num_experts_per_tok"], SIZES["num_experts"]
    theirs = SIZES["router_aux_loss_coef"] * load_balancing_loss_func(tuple(layers), num_experts, top_k)
    config = FAMILY.transformer_config(SIZES | {"num_hidden_layers": len(layers)})
    ours = torch.zeros(())
    for logits in layers:
        routing, scores = compute_routing_scores_for_aux_loss(logits, top_k, config["moe_router_score_function"])
        ours += switch_load_balancing_loss_func(
            scores, routing.sum(0), len(logits), top_k, num_experts, config["moe_aux_loss_coeff"]
        )
    return float(theirs), float(ours)


def test_auxiliary_loss_of_one_layer_equals_transformers() -> None:
    torch.manual_seed(0)
    theirs, ours = losses([torch.randn(40, 8)])
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_auxiliary_loss_of_layers_that_route_alike_equals_transformers() -> None:
    torch.manual_seed(0)
    theirs, ours = losses([torch.randn(40, 8)] * 3)
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_auxiliary_loss_of_layers_that_differ_is_megatrons_mean_over_layers() -> None:
    """The documented difference: transformers sees only the average over layers, so imbalances may cancel."""
    torch.manual_seed(0)
    layers = [torch.randn(400, 8) + torch.randn(8) * 2 for _ in range(3)]
    theirs, ours = losses(layers)
    each = [losses([logits])[0] for logits in layers]
    assert ours == pytest.approx(sum(each) / 3, rel=1e-6)
    assert ours > theirs * 1.05


def test_no_auxiliary_loss_unless_transformers_adds_it() -> None:
    config = FAMILY.transformer_config(SIZES | {"output_router_logits": False})
    assert config["moe_aux_loss_coeff"] == 0.0
    assert config["moe_router_load_balancing_type"] == "none"
    assert config["moe_z_loss_coeff"] is None


def test_stated_z_loss_is_applied() -> None:
    assert FAMILY.transformer_config(SIZES | {"router_z_loss_coef": 0.001})["moe_z_loss_coeff"] == 0.001
