"""torch's optimizers for the hf engine. (megatron-core has its own for the other one.)"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from swift_dist.config.job import OptimizerSection
from swift_dist.errors import JobError

if TYPE_CHECKING:
    import torch

_FUSED_DEVICES = ("cuda", "cpu")  # where torch has AdamW in one kernel


def make_optimizer(
    groups: list[dict[str, Any]], section: OptimizerSection, device: torch.device
) -> torch.optim.Optimizer:
    """An optimizer over `parameter_groups`.

    adamw  AdamW (Loshchilov and Hutter, arXiv 1711.05101), fused
    sgd    with momentum; weight decay is added to the gradient, as torch (and megatron) have it
    muon   Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) for hidden matrices, its step brought to the
           size of AdamW's (Liu et al., arXiv 2502.16982), so that one learning rate serves both; AdamW for the rest

    Args:
        groups: of float32 parameters: they are the masters.
        section: of the job.
        device: that the model computes on.

    Raises:
        JobError: Muon, which orthogonalises whole matrices, over shards of them.
    """
    import torch

    parameters = [parameter for group in groups for parameter in group["params"]]
    assert all(parameter.dtype == torch.float32 for parameter in parameters), "what learns is held in float32"
    if section.name == "sgd":
        return torch.optim.SGD(groups, lr=section.lr, momentum=section.momentum)
    adamw = {"lr": section.lr, "betas": section.betas, "eps": section.eps, "fused": device.type in _FUSED_DEVICES}
    if section.name == "adamw":
        return torch.optim.AdamW(groups, **adamw)  # type: ignore[arg-type]
    if any(_is_sharded(parameter) for parameter in parameters):
        raise JobError(
            "optimizer.name",
            "muon orthogonalises whole matrices, and this strategy leaves each rank a part of every matrix",
            "use strategy ddp (or deepspeed: zero0), or optimizer.name: adamw",
        )
    return _muon(groups, section, adamw)


def _is_sharded(parameter: torch.Tensor) -> bool:
    """By FSDP2 or TP (a DTensor), or by ZeRO-3."""
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_tensor")


def _muon(groups: list[dict[str, Any]], section: OptimizerSection, adamw: dict[str, Any]) -> torch.optim.Optimizer:
    import torch

    matrices = [group for group in groups if group["is_hidden_matrix"]]
    rest = [group for group in groups if not group["is_hidden_matrix"]]
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(
            torch.optim.Muon(matrices, lr=section.lr, momentum=section.momentum, adjust_lr_fn="match_rms_adamw")
        )
    if rest:
        parts.append(torch.optim.AdamW(rest, **adamw))
    return parts[0] if len(parts) == 1 else _chained(parts)


def _chained(parts: list[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """Optimizers of different parameters as one, which shares its groups and its state with them."""
    import torch

    class Chained(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__([group for part in parts for group in part.param_groups], {})
            for part in parts:
                part.state = self.state

        def step(self, closure: Any = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for part in parts:
                part.step()
            return loss

    return Chained()
