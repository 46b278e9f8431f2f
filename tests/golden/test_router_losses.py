"""The router's losses act as on one rank, whatever the layout: their gradients equal those of transformers' own loss.

They are no part of the reported loss, so the gradient norm (and, from the second step on, the loss) shows them. One MoE
layer, because transformers pools several layers into one loss and megatron has one for each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import golden_cases as cases
import golden_table as table
import pytest

COEFFICIENTS = {
    "balance": {"output_router_logits": True, "router_aux_loss_coef": 0.5},
    "z": {"output_router_logits": True, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.1},
    "off": {"output_router_logits": False, "router_aux_loss_coef": 0.5},
}
LAYOUTS = ["TP1", "TP2+SP", "CP2", "EP2", "PP2", "DP2+distopt"]


def config(name: str) -> dict[str, Any]:
    return {**cases.MODELS["qwen3_moe"], "mlp_only_layers": [0, 2, 3], **COEFFICIENTS[name]}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[tuple[float, float]]]]:
    import golden_reference as reference

    found = {}
    for name in COEFFICIENTS:
        folder = tmp_path_factory.mktemp(name)
        model = reference.make_model(config(name))
        reference.save(model, folder)
        found[name] = folder, reference.train(model, steps=2, auxiliary=name != "off")
    return found


def test_the_losses_matter(references: Any) -> None:
    norms = {name: numbers[0][1] for name, (_, numbers) in references.items()}
    assert abs(norms["balance"] - norms["off"]) > 1e-3 * norms["off"]
    assert abs(norms["z"] - norms["off"]) > 1e-3 * norms["off"]


@pytest.mark.parametrize(("name", "layout"), [("off", "TP1"), *((n, at) for n in ("balance", "z") for at in LAYOUTS)])
def test_router_losses(gang: Any, references: Any, name: str, layout: str) -> None:
    folder, expected = references[name]
    job = cases.job("qwen3_moe", layout)
    job["model"]["config"] = config(name)
    world = cases.layout(layout).world_size
    ranks = Path(__file__).with_name("golden_ranks.py")
    results = gang.run(ranks, "train", world, job=job, weights=str(folder), steps=2)
    cell = table.compare(results, expected)
    assert cell.loss_error <= 1e-5
    assert cell.norm_error <= 1e-5
