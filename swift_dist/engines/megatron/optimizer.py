"""megatron-core's optimizer for a job, with what it gets wrong around torch's AdamW put right."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import ParamGroupOverride, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from swift_dist.config import JobConfig
from swift_dist.engines.megatron.settings import optimizer_config
from swift_dist.optim import decays


def build_optimizer(job: JobConfig, chunks: list[Any]) -> ChainedOptimizer:
    """AdamW, SGD or Muon over the chunks' parameters; experts have their own optimizer in the chain."""
    undecayed = ParamWithNamePredicate(
        name="undecayed",
        fn=lambda parameter, name: (
            not decays(name, parameter.shape, decay_norm_and_bias=job.optimizer.decay_norm_and_bias)
        ),
    )
    overrides = {ParamKey(with_name_predicate=undecayed): ParamGroupOverride(wd_mult=0.0)}
    config = optimizer_config(job)
    if job.optimizer.name == "muon":
        from megatron.core.optimizer.muon import get_megatron_muon_optimizer

        optimizer = get_megatron_muon_optimizer(config, chunks, overrides, use_gloo_process_groups=False)
    else:
        optimizer = get_megatron_optimizer(config, chunks, overrides, use_gloo_process_groups=False)
    assert isinstance(optimizer, ChainedOptimizer)
    set_update_count(optimizer, 0)
    _share_loss_scaler(optimizer)
    return optimizer


def parts(optimizer: ChainedOptimizer) -> list[MegatronOptimizer]:
    """The chain's optimizers that have parameters on this rank, or might have."""
    return [part for part in optimizer.chained_optimizers if not getattr(part, "is_stub_optimizer", False)]


def set_rates(optimizer: ChainedOptimizer, lr: float, weight_decay: float) -> None:
    """Give every parameter group its rate and decay. (Megatron leaves both to its stateful scheduler.)"""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]


def clip(optimizer: ChainedOptimizer, max_norm: float, total_norm: float) -> None:
    """Scale the ready gradients so that their global norm is at most `max_norm` (0: leave them)."""
    if max_norm == 0.0:
        return
    for part in parts(optimizer):
        if parameters := part.get_parameters():
            clip_grad_by_total_norm_fp32(
                parameters, max_norm, total_norm, part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            )


def set_update_count(optimizer: ChainedOptimizer, updates: int) -> None:
    """Make every torch optimizer's state whole and tell AdamW that `updates` updates were done.

    Called when the optimizer is built, before it is saved and after it was loaded. transformer-engine's and apex's
    Adam count in their parameter groups, which are no part of a checkpoint (see `state.collect`): without this the bias
    correction would begin anew. torch's AdamW counts for each parameter, and megatron-core 0.16.1 has two traps:
    - its loading gives all parameters ONE `step` tensor, which AdamW then advances once per parameter: the first
      resumed loss is right, the second is not;
    - an optimizer restored before its first update has no `step` (KeyError).
    """
    for part in parts(optimizer):
        if isinstance(part.optimizer, torch.optim.SGD):
            part.init_state_fn = _nothing
            _fill_state(part.optimizer, ("momentum_buffer",))  # zeros: the first update is the same as without
        elif (inner := _inner_adamw(part)) is not None:
            _fill_state(inner, ("exp_avg", "exp_avg_sq"))
            for state in inner.state.values():
                state["step"] = torch.tensor(float(updates))
        elif isinstance(part.optimizer, megatron_optimizer.Adam):
            _fill_state(part.optimizer, ("exp_avg", "exp_avg_sq"))
            for group in part.optimizer.param_groups:
                group["step"] = updates


def _fill_state(inner: torch.optim.Optimizer, names: tuple[str, ...]) -> None:
    for group in inner.param_groups:
        for parameter in group["params"]:
            for name in names:
                if name not in inner.state[parameter]:
                    inner.state[parameter][name] = torch.zeros_like(parameter.data)


def _nothing(*_: Any) -> None:
    """Megatron asks every optimizer for a function that makes its state; it has none for SGD."""


def counts_for_each_parameter(optimizer: ChainedOptimizer) -> bool:
    """Whether this is torch's AdamW, whose every state has a `step`."""
    return any(_inner_adamw(part) is not None for part in parts(optimizer))


def _inner_adamw(part: MegatronOptimizer) -> torch.optim.Optimizer | None:
    return part.optimizer if isinstance(part.optimizer, (torch.optim.AdamW, torch.optim.Adam)) else None


class LossScaler:
    """One fp16 loss scale for the whole chain, moved once per step by the engine.

    Megatron gives dense and expert parameters a scaler each and scales the loss with the first one's: once only one of
    them overflows, the experts' gradients are divided by another number than they were multiplied with.
    """

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler

    @property
    def scale(self) -> torch.Tensor:
        return self._scaler.scale

    @property
    def inv_scale(self) -> torch.Tensor:
        return self._scaler.inv_scale

    @property
    def at_minimum(self) -> bool:
        return bool(self._scaler.scale <= self._scaler.min_scale)

    def update(self, found_inf: bool) -> None:
        """Called by each optimizer of the chain for itself: too early and too often. See `move`."""

    def move(self, found_inf: bool) -> None:
        self._scaler.update(found_inf)

    def state_dict(self) -> dict[str, Any]:
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scaler.load_state_dict(state)


def _share_loss_scaler(optimizer: ChainedOptimizer) -> None:
    scalers = [part.grad_scaler for part in optimizer.chained_optimizers if getattr(part, "grad_scaler", None)]
    if scalers:
        shared = LossScaler(scalers[0])
        for part in optimizer.chained_optimizers:
            part.grad_scaler = shared


def loss_scaler(optimizer: ChainedOptimizer) -> LossScaler | None:
    """The shared scaler, in fp16."""
    return getattr(optimizer.chained_optimizers[0], "grad_scaler", None) if optimizer.chained_optimizers else None


def free_state(optimizer: ChainedOptimizer) -> None:
    """Give back the memory of moments and fp32 masters now, whoever still refers to the optimizer."""
    for part in parts(optimizer):
        part.optimizer.state.clear()
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
                parameter.data = parameter.data.new_empty(0)
