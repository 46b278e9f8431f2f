"""A stand-in for transformer-engine's and apex's FusedAdam on the CPU: AdamW that counts its updates in its groups."""

from __future__ import annotations

from typing import Any

import torch


class GroupAdam(torch.optim.Optimizer):
    """AdamW with that bookkeeping: `step` is a number in the group, and a parameter's state is its two moments."""

    def __init__(
        self, params: Any, *, lr: float, betas: Any, eps: float, weight_decay: float, adam_w_mode: bool
    ) -> None:
        assert adam_w_mode
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group["step"] + 1 if "step" in group else 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        (beta1, beta2), step = group["betas"], group["step"]
        state = self.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(parameter)
        state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(state["exp_avg"] / (1 - beta1**step), root, value=-group["lr"])


def use() -> None:
    """Make megatron take it for transformer-engine's, in this process."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.USING_PYTORCH_OPTIMIZER = False
    optimizer.Adam = distrib_optimizer.Adam = GroupAdam
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
