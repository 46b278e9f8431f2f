"""AdaLoRA: the budget of ranks, beside PEFT's own loop; the orthogonality term; resumes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from pydantic import ValidationError

from swift_dist.tuners._stack import TunerStack
from tests.tuners.tiny import batch, groups_of, load, logits, stack_of

OPTIONS = {"initial_rank": 4, "target_rank": 2, "warmup_steps": 1, "final_steps": 2, "orthogonality": 0.0}
STEPS = 7
LR = 1e-3


def kept(model: Any) -> dict[str, list[bool]]:
    return {n: (p != 0).view(-1).tolist() for n, p in model.named_parameters() if ".lora_E." in n}


def backward(model: Any) -> None:
    model(input_ids=batch()).logits.log_softmax(-1)[..., 1].mean().neg().backward()


def steps_of(model: Any, stack: TunerStack, optimizer: torch.optim.Optimizer, steps: range) -> list[int]:
    """Trains; returns how many ranks are left after each step."""
    left = []
    model.train()
    for step in steps:
        stack.before_step(model, step, STEPS)
        backward(model)
        stack.before_update(model, step, STEPS)
        optimizer.step()
        optimizer.zero_grad()
        left.append(sum(map(sum, kept(model).values())))
    return left


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=LR)


def test_ranks_shrink_to_the_budget_and_are_those_of_pefts_own_loop(bases):
    stack = stack_of("adalora", adalora=OPTIONS)
    model = stack.apply(load(bases["llama"]), seed=0)
    left = steps_of(model, stack, stack.optimizer(groups_of(model, stack, LR), adamw), range(STEPS))
    matrices = 4 * 7
    cubic = [int((4 - 2) * matrices * (1 - (done - 1) / (STEPS - 2 - 1)) ** 3 + 2 * matrices) for done in (2, 3, 4, 5)]
    assert left == [4 * matrices, *cubic, 2 * matrices, 2 * matrices]

    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=2, deltaT=1, lora_alpha=32, total_step=STEPS, orth_reg_weight=0.0,
        target_modules="all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = get_peft_model(load(bases["llama"]), config)
    theirs.load_state_dict(stack.apply(load(bases["llama"]), seed=0).state_dict())
    optimizer = adamw([p for p in theirs.parameters() if p.requires_grad])
    theirs.train()
    for step in range(STEPS):
        backward(theirs)
        optimizer.step()
        theirs.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    assert kept(theirs) == kept(model)
    assert (logits(theirs) - logits(model)).abs().max() < 1e-5


def test_the_orthogonality_term_has_the_gradient_of_pefts_loss(bases):
    stack = stack_of("adalora", adalora=OPTIONS | {"orthogonality": 0.5})
    model = stack.apply(load(bases["llama"]), seed=0)
    model.train()
    backward(model)
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(1024)  # fp16's loss scale
    stack.before_step(model, 0, STEPS)
    stack.before_update(model, 0, STEPS, gradient_scale=1024.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(1024)
    ours = {n: p.grad - before[n] for n, p in model.named_parameters() if p.grad is not None}

    def gradient_with(weight: float) -> dict[str, torch.Tensor]:
        model.peft_config["default"].orth_reg_weight = weight
        model.zero_grad()
        model(input_ids=batch(), labels=batch()).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    with_term, without = gradient_with(0.5), gradient_with(0.0)
    assert max(g.abs().max() for g in ours.values()) > 1e-4
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, with_term[name] - without[name], rtol=1e-4, atol=1e-7)


def test_a_resume_goes_on_with_the_same_ranks(bases):
    stack = stack_of("adalora", adalora=OPTIONS)
    whole = stack.apply(load(bases["llama"]), seed=0)
    optimizer = stack.optimizer(groups_of(whole, stack, LR), adamw)
    steps_of(whole, stack, optimizer, range(3))
    held = {n: p.detach().clone() for n, p in whole.named_parameters()}
    state = {k: v.clone() if torch.is_tensor(v) else v for k, v in stack.state(whole)["adalora"].items()}
    moments = copy.deepcopy(optimizer.state_dict())
    again = stack.apply(load(bases["llama"]), seed=0)
    second = stack.optimizer(groups_of(again, stack, LR), adamw)
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            parameter.copy_(held[name])
    second.load_state_dict(moments)
    stack.load_state(again, {"adalora": state})
    steps_of(whole, stack, optimizer, range(3, STEPS))
    steps_of(again, stack, second, range(3, STEPS))
    assert all(torch.equal(p, dict(whole.named_parameters())[n]) for n, p in again.named_parameters())


def test_ranks_that_do_not_shrink_are_refused():
    with pytest.raises(ValidationError, match="target_rank 4 is not below initial_rank 4"):
        stack_of("adalora", adalora={"initial_rank": 4, "target_rank": 4})
