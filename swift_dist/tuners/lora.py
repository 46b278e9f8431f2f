"""LoRA and its kin: a trained product of two thin matrices beside each frozen one, y = W x + s B A x."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from swift_dist.config.finetune import AnyNames, Names
from swift_dist.config.section import Section
from swift_dist.errors import JobError, RunError
from swift_dist.tuners._peft import ADAPTER, AdapterTuner, never_adapted, task_type

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    import torch
    from peft import PeftConfig

ALL_LINEAR = ("all-linear",)
_FACTORS = (f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight")
_INITIAL = "swift_dist_initial_factors"  # attribute of the model: initial A and B, where the base gave them up


class Options(Section):
    rank: int = Field(8, gt=0, description="rows of A, columns of B")
    alpha: int = Field(32, gt=0, description="the product is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of what goes into A")
    target_modules: Names = Field(
        ALL_LINEAR, description="last words of the names of adapted modules (all-linear: all but the output layer)"
    )
    exclude_modules: AnyNames = Field((), description="last words of the names of modules that are not adapted")
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="the model's biases that learn too: none, all, or those of adapted modules"
    )
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(rank) (arXiv 2312.03732)")
    use_dora: bool = Field(False, description="train the magnitude of each output apart (DoRA, arXiv 2402.09353)")
    init: str = Field(
        "default",
        pattern=r"^(default|gaussian|orthogonal|olora|pissa|pissa_niter_\d+)$",
        description="first A and B: default (B is 0), gaussian (B is 0), orthogonal, olora (arXiv 2406.01775), pissa "
        "(arXiv 2404.02948) or pissa_niter_N (with a randomised SVD of N iterations)",
    )
    lora_plus_ratio: float | None = Field(
        None, gt=0, description="learning rate of B as a multiple of A's (LoRA+, arXiv 2402.12354; it recommends 16)"
    )
    rank_pattern: dict[str, int] = Field({}, description="{last words of a module's name, or a regex: its rank}")
    alpha_pattern: dict[str, int] = Field({}, description="{last words of a module's name, or a regex: its alpha}")


class Lora(AdapterTuner):
    name = "lora"
    summary = "thin matrices beside the frozen ones (LoRA, arXiv 2106.09685; rsLoRA, DoRA, PiSSA, OLoRA, LoRA+)"

    def peft_config(self, model: torch.nn.Module, options: Options, modules_to_save: list[str] | None) -> PeftConfig:
        return lora_config(model, options, modules_to_save)

    def apply(
        self, model: torch.nn.Module, options: Options, *, seed: int, trainable: Sequence[str] = ()
    ) -> torch.nn.Module:
        has_experts = any(parameter.ndim == 3 for parameter in model.parameters())
        if changes_base(options) and has_experts and options.target_modules == ALL_LINEAR:
            raise JobError(
                "tuner.lora.init",
                f"{options.init} takes matrices apart, and the experts of a {type(model).__name__} lie in one tensor",
                "use init: default, or give target_modules outside the experts",
            )
        with warnings.catch_warnings():
            # PEFT warns of a conversion of its own that cannot scale by the square root; `converted` can
            warnings.filterwarnings("ignore", "Using Rank-Stabilized LoRA with rank_pattern", UserWarning)
            wrapped = super().apply(model, options, seed=seed, trainable=trainable)
        if changes_base(options):
            first = {n: p.detach().clone() for n, p in wrapped.named_parameters() if n.endswith(_FACTORS)}
            setattr(wrapped, _INITIAL, first)
        return wrapped

    def without(self, model: Any) -> AbstractContextManager[Any] | None:
        return None if hasattr(model, _INITIAL) else super().without(model)

    def learning_rate_scale(self, parameter_name: str, options: Options) -> float:
        is_b = ".lora_B." in parameter_name or ".lora_embedding_B." in parameter_name
        return options.lora_plus_ratio if options.lora_plus_ratio is not None and is_b else 1.0

    def state(self, model: torch.nn.Module) -> dict[str, Any]:
        """Of PiSSA and OLoRA the first factors: what the base lacks."""
        return dict(getattr(model, _INITIAL, {}))

    def load_state(self, model: torch.nn.Module, state: dict[str, Any]) -> None:
        """Take the first factors over, which the export subtracts.

        Raises:
            RunError: `apply` took another product out of the base than the run that saved `state`: another library or
                machine decomposes these weights otherwise.
        """
        ours = getattr(model, _INITIAL, {})
        for name, theirs in state.items():
            if not name.endswith(_FACTORS[0]):
                continue
            twin = name.removesuffix(_FACTORS[0]) + _FACTORS[1]
            if not _same_product((ours[twin], ours[name]), (state[twin], theirs)):
                raise RunError(
                    f"{name}: the initial decomposition of this weight differs from that of the run to be resumed",
                    "resume on the kind of machine it began on, or begin a new run from its export",
                )
        if state:
            setattr(model, _INITIAL, dict(state))

    def converted(
        self, model: torch.nn.Module, config: Any, weights: dict[str, torch.Tensor], options: Options
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """PiSSA and OLoRA train on W' = W - s B0 A0. What they make of W is  W + s [B, -B0] [A; A0],  a plain LoRA of
        twice the rank, so any program that reads LoRA applies it to the original base."""
        import torch

        first = getattr(model, _INITIAL, None)
        if first is None:
            return config, weights
        for name, start in first.items():
            trained = weights[name]
            start = start.to(trained)
            pair = [trained, start] if name.endswith(_FACTORS[0]) else [trained, -start]
            weights[name] = torch.cat(pair, dim=0 if name.endswith(_FACTORS[0]) else 1)
        more_alpha = math.sqrt(2) if config.use_rslora else 2  # the scaling stays
        config.r *= 2
        config.lora_alpha *= more_alpha
        config.rank_pattern = {key: rank * 2 for key, rank in config.rank_pattern.items()}
        config.alpha_pattern = {key: alpha * more_alpha for key, alpha in config.alpha_pattern.items()}
        config.init_lora_weights = True  # with "pissa", loading it would change the base
        return config, weights


def lora_config(model: torch.nn.Module, options: Options, modules_to_save: list[str] | None) -> PeftConfig:
    """PEFT's LoraConfig for `options`."""
    from peft import LoraConfig

    init: Any = True if options.init == "default" else options.init
    return LoraConfig(
        task_type=task_type(model),
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules="all-linear" if options.target_modules == ALL_LINEAR else list(options.target_modules),
        exclude_modules=[*options.exclude_modules, *never_adapted(model)] or None,
        bias=options.bias,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        init_lora_weights=init,
        rank_pattern=dict(options.rank_pattern),
        alpha_pattern=dict(options.alpha_pattern),
        modules_to_save=modules_to_save,
    )


def changes_base(options: Options) -> bool:
    """Whether the first A and B are taken out of the base's weights."""
    return options.init == "olora" or options.init.startswith("pissa")


def _same_product(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    """Whether B A = B' A' to 1e-4 of its norm. Signs and rotations that leave the product alone do not matter.

    |B A - B' A'|^2 = |[B, -B'] [A; A']|^2 = tr(G H)  with the small Gram matrices of the two factors.
    """
    import torch

    b = torch.cat([ours[0], -theirs[0]], dim=1).double()
    a = torch.cat([ours[1], theirs[1]], dim=0).double()
    left, right = b.T @ b, a @ a.T
    rank = len(ours[1])
    difference = (left * right).sum().clamp(min=0)
    size = (left[:rank, :rank] * right[:rank, :rank]).sum()
    return bool(difference <= 1e-8 * size)


TUNER = Lora()
