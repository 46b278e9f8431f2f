"""Weights that only the first rank has read: the other ranks build the same model on the meta device, and get its
tensors one by one when their strategy is about to shard them.

So a node's memory holds one whole model at most (the first rank's), and not one for each of its ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from swift_dist.config import JobConfig
from swift_dist.engines.hf.strategies import _deepspeed_config
from swift_dist.errors import JobError, RunError


def reads_alone(job: JobConfig, *, is_quantized: bool) -> bool:
    """Whether the first rank reads a model's weights for all.

    Args:
        job: its strategy says whether weights are sharded.
        is_quantized: the model is, or is to be while it is read; its packed weights and their scales cannot be made on
            the meta device.
    """
    return dist.get_world_size() > 1 and shards_weights(job) and not is_quantized


def shards_weights(job: JobConfig) -> bool:
    """FSDP2, or stage 3 of ZeRO."""
    if not job.strategy.deepspeed:
        return job.strategy.name == "fsdp2"
    return (_deepspeed_config.read(job).get("zero_optimization") or {}).get("stage") == 3


@contextlib.contextmanager
def failing_together(is_shared: bool) -> Iterator[None]:
    """Around what only some ranks may fail in (reading files). Collective: it ends when it has ended on every rank.

    Args:
        is_shared: otherwise nothing happens here.

    Raises:
        JobError, RunError: what another rank raised; this rank's own errors stay what they are.
    """
    if not is_shared:
        yield
        return
    error: BaseException | None = None
    try:
        yield
    except Exception as raised:
        error = raised
        raise
    finally:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, _as_values(error))
        if error is None:
            _raise_first(found)


def _as_values(error: BaseException | None) -> dict[str, str] | None:
    if error is None:
        return None
    if isinstance(error, JobError):
        return {"key": error.key, "message": error.message, "remedy": error.remedy}
    return {"message": f"{type(error).__name__}: {error}", "remedy": getattr(error, "remedy", "")}


def _raise_first(found: list[dict[str, str] | None]) -> None:
    for rank, values in enumerate(found):
        if values is not None and "key" in values:
            raise JobError(values["key"], values["message"], values["remedy"])
        if values is not None:
            raise RunError(f"rank {rank}: {values['message']}", values["remedy"])


def hand_out(tensors: Iterable[torch.Tensor], device: torch.device, lies_on: torch.device | None = None) -> None:
    """Give every rank the first rank's numbers, one tensor after the other, in place. Collective.

    Args:
        tensors: the same ones in the same order on every rank; on the first with numbers, on others those of the meta
            device take them.
        device: of this rank, where ranks can talk.
        lies_on: where the tensors are to lie afterwards (default: `device`).
    """
    target = lies_on or device
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        if tensor.is_meta:
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        else:
            whole = tensor.detach().to(device).contiguous()
        if whole.numel():
            dist.broadcast(whole.view(-1).view(torch.uint8), 0)
        if tensor.is_meta:
            _become(tensor, whole.to(target))
        elif tensor.device != target:
            tensor.data = whole.to(target)


def _become(meta: torch.Tensor, whole: torch.Tensor) -> None:
    """`meta` stays the object that modules and optimizers refer to."""
    new = torch.nn.Parameter(whole, meta.requires_grad) if isinstance(meta, torch.nn.Parameter) else whole
    new.__dict__.update(vars(meta))
    torch.utils.swap_tensors(meta, new)


def parameters_of(part: torch.nn.Module) -> list[torch.Tensor]:
    """Those of a module that are not sharded yet."""
    return [parameter for parameter in part.parameters() if not isinstance(parameter, DTensor)]


def hand_out_the_rest(model: torch.nn.Module, device: torch.device) -> None:
    """`hand_out` what is no parameter: buffers, also those that no checkpoint has (rotary frequencies), and tensors
    that modules keep as plain attributes, which stay on the CPU."""
    hand_out(model.buffers(), device)
    kept = [value for module in model.modules() for value in vars(module).values() if torch.is_tensor(value)]
    hand_out(kept, device, torch.device("cpu"))


def require_alike(model: torch.nn.Module) -> None:
    """Collective. `hand_out` takes it for granted that ranks have made the same tensors.

    Raises:
        RunError: they have not, which a tuner can cause that looks at numbers to decide what learns.
    """
    plain = ((f"{n}.{k}", t) for n, m in model.named_modules() for k, t in vars(m).items() if torch.is_tensor(t))
    named = [*model.named_parameters(), *model.named_buffers(), *plain]
    lines = [f"{name} {tuple(t.shape)} {t.dtype} {t.requires_grad}" for name, t in named]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, hashlib.sha256("\n".join(lines).encode()).hexdigest())
    if len(set(found)) > 1:
        raise RunError(
            "ranks made different models where only the first one has the numbers of the weights",
            "use strategy ddp with this model or tuner",
        )
