"""FSDP2: weights, gradients and optimizer state sharded over the ranks, layer by layer.

torch's ``fully_shard`` (Zhao et al., arXiv 2304.11277) lays weights out, gathers them for a layer and scatters sums of
gradients. Each weight is cut along its first dimension, so a checkpoint's pieces are rows of it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from swift_dist.config import JobConfig
from swift_dist.engines.hf.strategies import _first_rank as first_rank
from swift_dist.engines.hf.strategies._torch import DTYPES, TorchStrategy
from swift_dist.engines.hf.strategies.base import Setting
from swift_dist.errors import JobError, RunError

WHOLE_GRADIENT_BYTES = 1 << 30
"""Up to here (all of an adapter's, say) gradients are kept whole on every rank between micro-batches and scattered once
a step; larger ones are scattered in every micro-batch, so that no rank ever holds them all."""


class FSDP2(TorchStrategy):
    """See `swift_dist.engines.hf.strategies.base.Strategy`.

    Weights that learn are float32 shards and their own masters. In bf16 and fp16 they are gathered in that precision,
    activations have it too, and gradients are reduced in float32. Frozen weights are gathered as they are held, so a
    layer may hold both (adapters on a bf16 base). A base quantised by bitsandbytes would need its packed weights stored
    as a floating dtype (``bnb_4bit_quant_storage``) and its quantisation state whole on every rank.

    Raises:
        JobError: ``strategy.hybrid_shard_size`` is for groups of all ranks only.
        RunError: a weight lies on the meta device.
    """

    def __init__(self, model: torch.nn.Module, setting: Setting) -> None:
        if not setting.from_first_rank and any(parameter.is_meta for parameter in model.parameters()):
            raise RunError("strategy fsdp2 takes a model with its weights, and this one is on the meta device")
        mesh = _mesh(setting.job, setting.device, setting.group)
        shard(model, setting.job, mesh, setting.device, from_first_rank=setting.from_first_rank)
        super().__init__(model, setting, replica=0)
        self.module, self._mesh = model, mesh
        whole = sum(weight.numel() * weight.element_size() for weight in self._weights.values())
        self._keeps_whole_gradients = whole <= WHOLE_GRADIENT_BYTES
        self._gathered = GatheredWeights(model, self._weights.values())
        self._hook = model.register_forward_hook(self._after_forward)

    @contextlib.contextmanager
    def _reducing(self, is_last: bool) -> Iterator[None]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(is_last or not self._keeps_whole_gradients)
        yield
        if is_last:
            self._drop_unused()

    @torch.no_grad()
    def _drop_unused(self) -> None:
        """FSDP2 takes zeros for a weight that this rank did not use, since others may have; one that no rank used has
        no gradient, as in one process."""
        used = torch.tensor(self._gathered.used(), dtype=torch.uint8, device=self.device)
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=self.group)
        for weight, is_used in zip(self._weights.values(), used.tolist(), strict=True):
            if not is_used:
                weight.grad = None

    def _sum_over_shards(self, squares: torch.Tensor) -> None:
        dist.all_reduce(squares, group=self._mesh.get_group(self._mesh.ndim - 1))

    def _held_gradients(self) -> Iterable[torch.Tensor]:
        return [*self._gradients(), *self._gathered.gradients()]

    def skip(self) -> None:
        super().skip()
        self._gathered.drop_gradients()

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        on_device = DTensor.from_local(  # offloaded shards are not on it, and only there ranks can talk
            tensor.to_local().to(self.device),
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
        return on_device.full_tensor()

    def _after_forward(self, *_: Any) -> None:
        """Outside of a step the model's parameters are the sharded ones, for whoever reads or changes them."""
        if not torch.is_grad_enabled():  # else the backward pass sees to it
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def close(self) -> None:
        gathered = self.__dict__.pop("_gathered", None)
        if gathered is not None:
            gathered.close()
            self._hook.remove()
        self.__dict__.pop("_mesh", None)
        super().close()


class GatheredWeights:
    """The whole weights that FSDP2 computes with: which of them got gradients, and which keep them between
    micro-batches.

    Made while everything that may learn does: FSDP2 takes the dtypes of gradients from that moment, and a layer that
    is frozen in the first step would have none. Only this class knows FSDP2's internals (torch 2.13).

    Args:
        model: a root that `shard` was applied to.
        weights: sharded ones that may learn.
    """

    def __init__(self, model: torch.nn.Module, weights: Iterable[torch.Tensor]) -> None:
        assert isinstance(model, FSDPModule)
        model._get_fsdp_state()._lazy_init()
        modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        groups = {id(g): g for module in modules for g in module._get_fsdp_state()._fsdp_param_groups}
        for module in modules:
            module.unshard()
            module.reshard()
        by_weight = {id(p.sharded_param): p for group in groups.values() for p in group.fsdp_params}
        self._params = [by_weight[id(weight)] for weight in weights]
        self._used = [False] * len(self._params)
        self._hooks = [
            param._unsharded_param.register_post_accumulate_grad_hook(functools.partial(self._note, index))
            for index, param in enumerate(self._params)
        ]

    def _note(self, index: int, parameter: torch.Tensor) -> None:
        self._used[index] = True

    def used(self) -> list[bool]:
        """Which weights got a gradient since the last call."""
        found, self._used = self._used, [False] * len(self._params)
        return found

    def gradients(self) -> list[torch.Tensor]:
        """What is kept whole between micro-batches."""
        kept = [t for p in self._params for t in (p._unsharded_param.grad, p.unsharded_accumulated_grad)]
        return [tensor for tensor in kept if tensor is not None]

    def drop_gradients(self) -> None:
        """Of micro-batches that were not reduced."""
        self._used = [False] * len(self._params)
        for param in self._params:
            param._unsharded_param.grad = param.unsharded_accumulated_grad = None

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._params, self._hooks = [], []


def shard(
    model: torch.nn.Module,
    job: JobConfig,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    is_frozen: bool = False,
    from_first_rank: bool = False,
) -> None:
    """Shard each layer, the embeddings and the head by themselves, and the rest as the root's own, in place.

    Args:
        model: whole, the same on every rank; or on the first one, and on the meta device of the others, which get one
            layer at a time.
        job: its precision and its strategy's settings.
        mesh: [ranks], or [replicas, ranks of a shard].
        device: of this rank.
        is_frozen: nothing of it learns; no gathered weight is kept for a backward pass.
        from_first_rank: only the first rank's model is whole.
    """
    if from_first_rank:
        first_rank.hand_out_the_rest(model, device)
    precision = DTYPES[job.train.precision]
    mixed = MixedPrecisionPolicy() if precision == torch.float32 else MixedPrecisionPolicy(precision, torch.float32)
    arguments: dict[str, Any] = {"mesh": mesh, "mp_policy": mixed}
    if job.strategy.cpu_offload:
        arguments["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    reshard = is_frozen or job.strategy.reshard_after_forward
    # What is left to the root is used first in the backward pass: gathered weights stay for it.
    for part, reshards in (*((part, reshard) for part in parts(model)), (model, is_frozen)):
        if from_first_rank:
            first_rank.hand_out(first_rank.parameters_of(part), device)
        fully_shard(part, **arguments, reshard_after_forward=reshards)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sums instead of means. The plain SUM: gloo has none of the other operations.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
            module.set_reduce_scatter_unused_params(True, recurse=False)


def shard_frozen(
    model: torch.nn.Module, job: JobConfig, device: torch.device, *, from_first_rank: bool = False
) -> torch.nn.Module:
    """A model of which nothing learns (a reference), sharded as one that does."""
    shard(model, job, _mesh(job, device, None), device, is_frozen=True, from_first_rank=from_first_rank)
    return model


def parts(model: torch.nn.Module) -> list[torch.nn.Module]:
    """What is sharded by itself: every layer, then the embeddings and the head, unless they are one and the same.

    Layers are what transformers never splits (``_no_split_modules``); where a model does not say, the members of its
    longest ``ModuleList``.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        lists = [list(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
        found = max(lists, key=len, default=[])
    inside = {id(below) for module in found for below in module.modules() if below is not module}
    found = [module for module in found if id(module) not in inside]
    return found + _embeddings_and_head(model, {*inside, *map(id, found)})


def _embeddings_and_head(model: torch.nn.Module, taken: set[int]) -> list[torch.nn.Module]:
    ends = []
    for method in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):
            ends.append(getattr(model, method)())
    modules = [end for end in ends if isinstance(end, torch.nn.Module) and id(end) not in taken]
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return [module for module in modules if all(owners[id(p)] == 1 for p in module.parameters())]


def _mesh(job: JobConfig, device: torch.device, group: dist.ProcessGroup | None) -> DeviceMesh:
    ranks, size = dist.get_world_size(group), job.strategy.hybrid_shard_size
    if size is None or size == ranks:
        if group is not None:
            return DeviceMesh.from_group(group, device.type)
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    if group is not None:
        raise JobError(
            "strategy.hybrid_shard_size", f"{size} needs all ranks to be data-parallel", "leave it out, or use ddp"
        )
    assert ranks % size == 0, "resolve() has checked it"
    return init_device_mesh(device.type, (ranks // size, size), mesh_dim_names=("replicate", "shard"))


STRATEGY = FSDP2
