"""Optimizers of tuners as strategies save them: a save in the midst of a run changes nothing, and a resume goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from swift_dist.engines.hf.strategies._state import OptimizedWeights
from tests.tuners.tiny import batch, groups_of, load, stack_of

STEPS = 6


def started(name: str, section: dict[str, Any], bases: Any) -> tuple[Any, Any, OptimizedWeights]:
    stack = stack_of(name, **section)
    model = stack.apply(load(bases["llama"]), seed=0)
    optimizer = stack.optimizer(groups_of(model, stack, 0.01), lambda groups: torch.optim.AdamW(groups, lr=0.01))
    return stack, model, OptimizedWeights(model, optimizer, 0)


def go_on(stack: Any, model: Any, optimized: OptimizedWeights, steps: range) -> None:
    model.train()
    for step in steps:
        stack.before_step(model, step, STEPS)
        model(input_ids=batch()).logits.log_softmax(-1)[..., 1].mean().neg().backward()
        stack.before_update(model, step, STEPS)
        optimized.optimizer.step()
        optimized.optimizer.zero_grad()


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("galore", {"galore": {"rank": 4, "interval": 2}}),
        ("lisa", {"lisa": {"active_layers": 1, "interval": 1}}),
        ("adalora", {"adalora": {"initial_rank": 4, "target_rank": 2, "final_steps": 1}}),
        ("lora", {"lora": {"init": "pissa", "lora_plus_ratio": 4.0}}),
    ],
)
def test_a_save_changes_nothing_and_a_resume_goes_on(name, section, bases):
    stack, model, optimized = started(name, section, bases)
    go_on(stack, model, optimized, range(STEPS))
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}

    stack, model, optimized = started(name, section, bases)
    optimized.collect(is_loading=False)  # before the first step, when nothing has state yet
    go_on(stack, model, optimized, range(3))
    saved = optimized.collect(is_loading=False)
    tensors = {part: {k: piece.data.clone() for k, piece in saved[part].items()} for part in ("model", "optimizer")}
    state = {
        t: {k: v.clone() if torch.is_tensor(v) else v for k, v in s.items()} for t, s in stack.state(model).items()
    }
    go_on(stack, model, optimized, range(3, STEPS))
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters()), "a save changes nothing"

    stack, model, optimized = started(name, section, bases)
    optimized.collect(is_loading=True)
    optimized.take_over(tensors, saved["counts"])
    stack.load_state(model, state)
    go_on(stack, model, optimized, range(3, STEPS))
    for n, p in model.named_parameters():
        torch.testing.assert_close(p, expected[n], rtol=0, atol=0, msg=n)
