"""Parameter groups and optimizers of the hf engine, beside torch's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from swift_dist.config.job import OptimizerSection
from swift_dist.optim import make_optimizer, parameter_groups

CPU = torch.device("cpu")


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = torch.nn.Embedding(7, 4)
        self.norm = torch.nn.LayerNorm(4)
        self.up = torch.nn.Linear(4, 6)
        self.frozen = torch.nn.Linear(6, 6).requires_grad_(False)
        self.down = torch.nn.Linear(6, 4)
        self.lm_head = torch.nn.Linear(4, 7, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.down(self.frozen(self.up(self.norm(self.embed(tokens)))))
        return self.lm_head(hidden).logsumexp(-1).square().sum()


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> dict[str, torch.Tensor]:
    for step in range(steps):
        model(torch.arange(7).roll(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_groups_hold_what_learns_once_with_its_decay_and_rate() -> None:
    model = Tiny()
    section = OptimizerSection(weight_decay=0.3)
    groups = parameter_groups(model, section, lambda name: 4.0 if name.startswith("up") else 1.0)
    found = {
        name: (group["weight_decay"], group["lr_scale"], group["is_hidden_matrix"])
        for group in groups
        for name in group["names"]
    }
    assert found == {
        "embed.weight": (0.3, 1.0, False),  # tied to the head: once
        "norm.weight": (0.0, 1.0, False),
        "norm.bias": (0.0, 1.0, False),
        "up.weight": (0.3, 4.0, True),
        "up.bias": (0.0, 4.0, False),
        "down.weight": (0.3, 1.0, True),
        "down.bias": (0.0, 1.0, False),
    }
    named = dict(model.named_parameters())
    assert all(named[n] is p for group in groups for n, p in zip(group["names"], group["params"], strict=True))
    every = parameter_groups(model, section.model_copy(update={"decay_norm_and_bias": True}), lambda name: 1.0)
    assert {group["weight_decay"] for group in every} == {0.3}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_updates_are_those_of_torch(name: str) -> None:
    section = OptimizerSection(name=name, lr=0.01, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-6, momentum=0.7)
    ours, theirs = Tiny(), Tiny()
    optimizer = make_optimizer(parameter_groups(ours, section, lambda name: 1.0), section, CPU)
    groups: list[Any] = [
        {"params": [p], "weight_decay": 0.2 if p.dim() > 1 else 0.0} for p in theirs.parameters() if p.requires_grad
    ]
    plain = (
        torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), eps=1e-6, foreach=False)
        if name == "adamw"
        else torch.optim.SGD(groups, lr=0.01, momentum=0.7, foreach=False)
    )
    expected = train(theirs, plain)
    for key, weight in train(ours, optimizer).items():
        assert (weight - expected[key]).abs().max() <= 1e-6, key


def test_muon_moves_hidden_matrices_and_adamw_the_rest() -> None:
    section = OptimizerSection(name="muon", lr=0.01, weight_decay=0.2, momentum=0.8)
    ours, theirs = Tiny(), Tiny()
    optimizer = make_optimizer(parameter_groups(ours, section, lambda name: 1.0), section, CPU)
    named = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    matrices = [named.pop("up.weight"), named.pop("down.weight")]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.2, momentum=0.8, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.2 if p.dim() > 1 else 0.0} for p in named.values()],
        lr=0.01,
        betas=section.betas,
        eps=section.eps,
    )
    model = copy.deepcopy(theirs)
    for step in range(3):
        theirs(torch.arange(7).roll(step)).backward()
        for part in (muon, adamw):
            part.step()
            part.zero_grad()
    for key, weight in train(ours, optimizer).items():
        assert (weight - theirs.get_parameter(key)).abs().max() <= 1e-6, key
        assert torch.equal(weight, model.get_parameter(key)) == key.startswith("frozen")
    moments = {name: set(optimizer.state[p]) for name, p in ours.named_parameters() if p.requires_grad}
    assert moments["up.weight"] == {"momentum_buffer"}
    assert moments["embed.weight"] == {"step", "exp_avg", "exp_avg_sq"}


def test_rates_of_the_groups_are_the_chained_optimizers_own() -> None:
    section = OptimizerSection(name="muon")
    model = Tiny()
    optimizer = make_optimizer(parameter_groups(model, section, lambda name: 1.0), section, CPU)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert all(torch.equal(weight, before[name]) for name, weight in train(model, optimizer).items())
