"""AdaLoRA: B diag(E) A beside each frozen matrix, and a budget of ranks that moves to the matrices that need them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from swift_dist.config.finetune import AnyNames, Names
from swift_dist.config.section import Section
from swift_dist.errors import JobError, RunError
from swift_dist.tuners._peft import ADAPTER, AdapterTuner, never_adapted, task_type
from swift_dist.tuners.base import Strategy

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

    from swift_dist.config import JobConfig

_MODEL = "swift_dist_model"  # attribute of each E: a weak reference to the model that it is in
_COMING = "swift_dist_update"  # attribute of the model: number of the update that comes next; None: none does


class Options(Section):
    initial_rank: int = Field(12, gt=0, description="rank of every product at first")
    target_rank: int = Field(8, gt=0, description="mean rank of the products at last")
    alpha: int = Field(32, gt=0, description="products are scaled by alpha / initial_rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of what goes into A")
    target_modules: Names = Field(
        ("all-linear",), description="last words of the names of adapted modules (all-linear: all but the output layer)"
    )
    exclude_modules: AnyNames = Field((), description="last words of the names of modules that are not adapted")
    warmup_steps: int = Field(0, ge=0, description="first steps, with all ranks")
    final_steps: int = Field(0, ge=0, description="last steps, in which ranks do not move any more")
    interval: int = Field(1, gt=0, description="steps between two choices of ranks")
    beta1: float = Field(0.85, gt=0, lt=1, description="decay rate of the mean importance of a weight")
    beta2: float = Field(0.85, gt=0, lt=1, description="decay rate of the mean deviation from it")
    orthogonality: float = Field(
        0.5, ge=0, description="weight in the loss of the mean of |A A' - 1| and |B' B - 1| over matrices"
    )

    @model_validator(mode="after")
    def _shrinks(self) -> Options:
        if self.target_rank >= self.initial_rank:
            raise ValueError(f"target_rank {self.target_rank} is not below initial_rank {self.initial_rank}; use lora")
        return self


class AdaLora(AdapterTuner):
    name = "adalora"
    summary = "LoRA with ranks given to the matrices that need them (AdaLoRA, arXiv 2303.10512)"

    def refuses(self, strategy: Strategy, options: Options) -> str | None:
        if strategy != "ddp":
            return f"ranks are chosen by whole weights and gradients, and {strategy} leaves each rank pieces of them"
        return None

    def check(self, job: JobConfig, options: Options) -> None:
        if job.train.steps is not None and options.warmup_steps + options.final_steps >= job.train.steps:
            raise JobError(
                "tuner.adalora.warmup_steps",
                f"{options.warmup_steps} and final_steps {options.final_steps} leave none of {job.train.steps} steps "
                "to choose ranks in",
                "lower them, or raise train.steps",
            )

    def peft_config(self, model: torch.nn.Module, options: Options, modules_to_save: list[str] | None) -> PeftConfig:
        from peft import AdaLoraConfig

        all_linear = options.target_modules == ("all-linear",)
        return AdaLoraConfig(
            task_type=task_type(model),
            init_r=options.initial_rank,
            target_r=options.target_rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules="all-linear" if all_linear else list(options.target_modules),
            exclude_modules=[*options.exclude_modules, *never_adapted(model)] or None,
            tinit=options.warmup_steps,
            tfinal=options.final_steps,
            deltaT=options.interval,
            beta1=options.beta1,
            beta2=options.beta2,
            orth_reg_weight=options.orthogonality,
            total_step=options.warmup_steps + options.final_steps + 1,  # PEFT wants one; `before_step` knows it
            modules_to_save=modules_to_save,
        )

    def apply(
        self, model: torch.nn.Module, options: Options, *, seed: int, trainable: Sequence[str] = ()
    ) -> torch.nn.Module:
        wrapped = super().apply(model, options, seed=seed, trainable=trainable)
        for name, parameter in wrapped.named_parameters():
            if f".lora_E.{ADAPTER}" in name:
                setattr(parameter, _MODEL, weakref.ref(wrapped))
        return wrapped

    def optimizer(self, groups: list[dict[str, Any]], make: Any, options: Options) -> torch.optim.Optimizer:
        """The job's own, after whose updates E is masked: as PEFT does it, and before anybody sees the new weights.

        Raises:
            RunError: `groups` do not hold the model's own parameters.
        """
        values = [p for group in groups for p in group["params"] if hasattr(p, _MODEL)]
        if not values:
            raise RunError("AdaLoRA's weights are copied before they are optimised", "use strategy ddp in fp32 masters")
        model = getattr(values[0], _MODEL)
        optimizer: torch.optim.Optimizer = make(groups)
        optimizer.register_step_post_hook(lambda *_: _mask(model()))
        return optimizer

    def before_step(self, model: Any, step: int, steps: int, options: Options) -> None:
        """Tell PEFT how long the run is."""
        model.peft_config[ADAPTER].total_step = steps

    def before_update(
        self, model: Any, step: int, steps: int, options: Options, *, gradient_scale: float = 1.0
    ) -> None:
        """Add the gradient of the orthogonality term, and take the step into the importance of each weight.

        PEFT adds that term to a loss that the model itself computes, and ours does not.
        """
        import torch

        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, 1 / gradient_scale)  # exact: loss scales are powers of 2
        if options.orthogonality:
            _add_orthogonality(model, options.orthogonality)
        if step + 1 <= steps - options.final_steps:
            _allocator(model).update_ipt(model.base_model.model)
        torch._foreach_mul_(gradients, gradient_scale)
        setattr(model, _COMING, step + 1)

    def state(self, model: Any) -> dict[str, Any]:
        """What the importance of weights is averaged from, and the ranks chosen last."""
        allocator = _allocator(model)
        averages = {"exp_avg_ipt": allocator.exp_avg_ipt, "exp_avg_unc": allocator.exp_avg_unc}
        state: dict[str, Any] = {f"{kind}.{name}": t for kind, values in averages.items() for name, t in values.items()}
        state["rank_pattern"] = model.peft_config[ADAPTER].rank_pattern
        return state

    def load_state(self, model: Any, state: dict[str, Any]) -> None:
        allocator = _allocator(model)
        parameters = dict(model.base_model.model.named_parameters())
        for key, value in state.items():
            kind, _, name = key.partition(".")
            if kind in ("exp_avg_ipt", "exp_avg_unc"):
                getattr(allocator, kind)[name] = value.to(parameters[name].device)
                allocator.ipt.setdefault(name, value)  # its presence says that the averages have begun
        model.peft_config[ADAPTER].rank_pattern = state["rank_pattern"]

    def converted(
        self, model: torch.nn.Module, config: Any, weights: dict[str, torch.Tensor], options: Any
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """The ranks that are left are those whose E is not 0: a run that ends early has others than it chose last."""
        kept = {
            name.removeprefix("base_model.model.").removesuffix(f".{ADAPTER}"): (value != 0).view(-1).tolist()
            for name, value in weights.items()
            if name.endswith(f".lora_E.{ADAPTER}")
        }
        config.rank_pattern = kept if any(any(rows) for rows in kept.values()) else None
        return config, weights


def _allocator(model: Any) -> Any:
    return model.base_model.rankallocator


def _mask(model: Any) -> None:
    """Set the E of the ranks that are given up to 0, by PEFT's cubic schedule of the budget.

    Once after each `before_update`: strategies also take steps without gradients, for the state that an optimizer makes
    in its first one.
    """
    done = getattr(model, _COMING, None)
    if done is None:
        return
    setattr(model, _COMING, None)
    allocator, config = _allocator(model), model.peft_config[ADAPTER]
    last = config.total_step - config.tfinal
    inner = model.base_model.model
    if done > last:
        allocator.mask_using_rank_pattern(inner, config.rank_pattern)
        return
    budget, is_due = allocator.budget_schedule(done)
    if is_due or done == last:
        config.rank_pattern = allocator.mask_to_budget(inner, budget)


def _add_orthogonality(model: torch.nn.Module, weight: float) -> None:
    """Add the gradient of  weight * mean over matrices of |P P' - 1|_F  (P = A, or B transposed) to what is there."""
    import torch

    factors = [
        (name, p)
        for name, p in model.named_parameters()
        if p.requires_grad and (f".lora_A.{ADAPTER}" in name or f".lora_B.{ADAPTER}" in name)
    ]
    with torch.enable_grad():
        total = torch.zeros(())
        for name, p in factors:
            gram = p @ p.T if ".lora_A." in name else p.T @ p
            total = total.to(gram.device) + torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device))
        gradients = torch.autograd.grad(total * (weight / len(factors)), [p for _, p in factors])
    for (_, p), gradient in zip(factors, gradients, strict=True):
        p.grad = gradient if p.grad is None else p.grad.add_(gradient)


TUNER = AdaLora()
