"""Where DeepSpeed 0.19 keeps a rank's share of masters, moments and gradients, stage by stage.

Each stage lays the weights that learn end to end in a few flat fp32 tensors and gives every rank a range of them
(ZeRO-3: a range of each weight). A `Piece` names such a range by the weight that it belongs to, which is all that a
checkpoint needs: Universal Checkpointing (https://arxiv.org/abs/2406.18820) without its conversion step. Only this file
knows DeepSpeed's internals.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from swift_dist.engines.hf.strategies._clip import multiply


@dataclass(frozen=True)
class Piece:
    """A range of a weight whose master and moments this rank holds.

    Args:
        name: the weight's, in the model.
        shape: of the whole weight.
        start: first of its elements (in row-major order) that this rank holds.
        length: how many.
        flat: number of the flat tensor that holds them.
        offset: where in it they begin.
    """

    name: str
    shape: torch.Size
    start: int
    length: int
    flat: int
    offset: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The range in its flat tensor, or in another that is laid out alike; shares its memory."""
        return flat.detach().view(-1).narrow(0, self.offset, self.length)


class Shards:
    """What every stage offers.

    Args:
        engine: DeepSpeed's.
        names: of the model's parameters.
    """

    is_replicated: ClassVar[bool] = False
    """Every rank holds the same whole weights and gradients."""
    reduces_in_backward: bool = False
    """Buckets of gradients are sent while a backward pass makes them, so all ranks must make the same ones."""

    def __init__(self, engine: Any, names: Mapping[Any, str]) -> None:
        self.engine, self.names = engine, names
        self.optimizer = engine.optimizer
        self.pieces = list(self._pieces())
        self.flats = self._flats()

    def _pieces(self) -> Iterator[Piece]:
        raise NotImplementedError

    def _flats(self) -> list[torch.Tensor]:
        raise NotImplementedError

    def group_of(self, flat: int) -> int:
        """Number of the parameter group that updates a flat tensor."""
        return flat

    def names_in(self, flat: int) -> list[str]:
        """Weights of which a flat tensor holds pieces."""
        return [piece.name for piece in self.pieces if piece.flat == flat]

    @contextlib.contextmanager
    def resident(self, flat: int, *, changes: bool) -> Iterator[bool]:
        """Around reading (or changing) a flat tensor and its moments, which may lie on a disk: they are read in, and
        written back if they change. Yields whether they were."""
        yield False

    def finish_gradients(self) -> None:
        """Every micro-batch is through: have the gradients summed over the ranks, wherever that is not done yet."""
        raise NotImplementedError

    def gradients(self) -> list[torch.Tensor]:
        """What this rank holds of the summed gradients, padding being 0. After `finish_gradients`."""
        raise NotImplementedError

    def held_gradients(self) -> Iterable[torch.Tensor]:
        """Everything that holds gradients now."""
        parameters = (p for p in self.engine.module.parameters() if p.requires_grad)
        local = [g for p in parameters for g in (p.grad, getattr(p, "grad_accum", None)) if g is not None]
        return [*local, *self.gradients()]

    def step(self, factor: float) -> None:
        """Multiply the gradients by `factor`, take the optimizer step, drop the gradients."""
        scaler = self.optimizer.loss_scaler
        scaler.cur_scale = 1.0 / factor  # what DeepSpeed divides by; the loss was not multiplied by it
        try:
            self.engine.step()
        finally:
            scaler.cur_scale = 1.0
        self.forget()

    def drop(self) -> None:
        """Drop the gradients of a step that is not taken."""
        raise NotImplementedError

    def forget(self) -> None:
        """Zero what DeepSpeed keeps of a step's gradients: a weight that the next step does not use (an expert) would
        be updated with its last gradient."""

    def refresh(self) -> None:
        """Make the weights that the model computes with those of the masters. Collective."""
        raise NotImplementedError

    def state(self, flat: int) -> dict[str, torch.Tensor]:
        """Name -> the optimizer's state of the same length as the flat tensor."""
        tensor = self.flats[flat]
        found = self.engine.basic_optimizer.state.get(tensor, {})
        return {k: v for k, v in found.items() if torch.is_tensor(v) and v.numel() == tensor.numel() and k != "step"}

    def counts_updates(self) -> bool:
        """Whether the optimizer counts its updates (Adam does)."""
        return any("step" in state for state in self.engine.basic_optimizer.state.values())

    def updates(self) -> int:
        """How many updates the optimizer has counted."""
        states = self.engine.basic_optimizer.state.values()
        return max((int(state["step"]) for state in states if "step" in state), default=0)

    def set_updates(self, number: int) -> None:
        """Let the optimizer go on counting from here."""
        for state in self.engine.basic_optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"].fill_(float(number))
            elif "step" in state:
                state["step"] = number

    def make_state(self) -> None:
        """Let the optimizer make its state, which it does in its first step: take one with gradients and a rate of
        0, as `torch.distributed.checkpoint.state_dict` does."""
        optimizer = self.engine.basic_optimizer
        groups = optimizer.param_groups
        before = self.updates()
        for number, flat in enumerate(self.flats):
            if optimizer.state.get(flat):
                continue
            with self.resident(number, changes=True):
                gradient, flat.grad = flat.grad, torch.zeros_like(flat)
                optimizer.param_groups = [{**groups[self.group_of(number)], "params": [flat], "lr": 0.0}]
                try:
                    optimizer.step()
                finally:
                    optimizer.param_groups, flat.grad = groups, gradient
        self.set_updates(before)

    def remove_hooks(self) -> None:
        """Take DeepSpeed's hooks off the model, waiting for nothing."""
        for hook in getattr(self.optimizer, "_grad_acc_hooks", []):
            hook.remove()


class WholeShards(Shards):
    """Stage 0: torch's own optimizer over the weights themselves."""

    is_replicated = True

    def _pieces(self) -> Iterator[Piece]:
        for number, parameter in enumerate(self._flats()):
            yield Piece(self.names[parameter], parameter.shape, 0, parameter.numel(), number, 0)

    def _flats(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def group_of(self, flat: int) -> int:
        lengths = [len(group["params"]) for group in self.optimizer.param_groups]
        return next(n for n in range(len(lengths)) if flat < sum(lengths[: n + 1]))

    def finish_gradients(self) -> None:
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.allreduce_gradients()

    def gradients(self) -> list[torch.Tensor]:
        return _grads(self.flats)

    def step(self, factor: float) -> None:
        multiply(self.gradients(), factor)
        self.engine.step()

    def drop(self) -> None:
        self.engine.zero_grad()

    def refresh(self) -> None:
        pass


class FlatShards(Shards):
    """Stages 1 and 2: each group's weights end to end, cut into one range for each rank."""

    def __init__(self, engine: Any, names: Mapping[Any, str]) -> None:
        super().__init__(engine, names)
        self.reduces_in_backward = getattr(self.optimizer, "partition_gradients", False)

    def _pieces(self) -> Iterator[Piece]:
        for number, group in enumerate(self._groups()):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    low, high = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                    yield Piece(self.names[parameter], parameter.shape, low.start, low.numel, number, high.start)

    def _groups(self) -> list[list[Any]]:
        return self.optimizer.bit16_groups

    def _flats(self) -> list[torch.Tensor]:
        return self.optimizer.single_partition_of_fp32_groups

    def finish_gradients(self) -> None:
        self.engine.set_gradient_accumulation_boundary(True)
        if self.reduces_in_backward:
            self.optimizer.finalize_gradient_accumulation_boundary()
        else:
            self._fill_missing()
            self.engine.allreduce_gradients()

    def _fill_missing(self) -> None:
        """A gradient of 0 for weights that this rank's rows did not use: DeepSpeed sends buckets of those that have
        one, and other ranks' buckets would hold other weights."""
        kept = self.optimizer.use_grad_accum_attribute
        for parameter in (p for group in self._groups() for p in group):
            if self.optimizer.get_gradient_for_reduction(parameter) is None:
                zeros = torch.zeros_like(parameter, dtype=torch.float32 if kept else None)
                setattr(parameter, "grad_accum" if kept else "grad", zeros)

    def gradients(self) -> list[torch.Tensor]:
        if self.optimizer.cpu_offload:
            return _grads(self.flats)
        found: list[torch.Tensor] = []
        for averaged in self.optimizer.averaged_gradients.values():
            flat = getattr(averaged, "flat_partition", None)
            found += [flat] if flat is not None else averaged or []
        return found

    def drop(self) -> None:
        optimizer = self.optimizer
        optimizer._wait_for_offload_copies()
        optimizer._release_ipg_buffers()
        optimizer.zero_grad()
        optimizer.micro_step_id = -1
        optimizer._release_preflattened_grad_buffers()
        if optimizer.cpu_offload:
            optimizer._offload_accumulated_param_ids = set()
            optimizer.reset_cpu_buffers()
        for kept in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            for number in kept:
                kept[number] = None
        self.forget()

    def forget(self) -> None:
        if self.optimizer.cpu_offload:
            for gradient in [*_grads(self.flats), *self.optimizer.accumulated_grads_in_cpu.values()]:
                gradient.zero_()

    def refresh(self) -> None:
        self.optimizer.update_lp_params()


class Bf16Shards(FlatShards):
    """Stage 1 in bf16, which DeepSpeed has a class of its own for: whole fp32 gradients on each rank."""

    def _groups(self) -> list[list[Any]]:
        return self.optimizer.bf16_groups

    def _flats(self) -> list[torch.Tensor]:
        return self.optimizer.fp32_groups_flat_partition

    def finish_gradients(self) -> None:
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.allreduce_gradients()

    def gradients(self) -> list[torch.Tensor]:
        return self.optimizer.fp32_groups_gradient_flat_partition

    def step(self, factor: float) -> None:
        multiply(self.gradients(), factor)
        self.engine.step()

    def drop(self) -> None:
        self.optimizer.zero_grad()


class PartitionedShards(Shards):
    """Stage 3: a range of each weight on each rank, those of a sub-group end to end in a flat tensor."""

    reduces_in_backward = True

    def _pieces(self) -> Iterator[Piece]:
        optimizer = self.optimizer
        for number, group in enumerate(optimizer.fp16_groups):
            for parameter in group:
                flat, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
                assert flat == number, "DeepSpeed numbers sub-groups in their order"
                start = dist.get_rank(parameter.ds_process_group) * numel
                length = min(numel, parameter.ds_numel - start)
                if length > 0:  # the last ranks' ranges of a small weight are padding
                    yield Piece(self.names[parameter], parameter.ds_shape, start, length, number, offset)

    def _flats(self) -> list[torch.Tensor]:
        return self.optimizer.fp32_partitioned_groups_flat

    def names_in(self, flat: int) -> list[str]:
        """Also those of which other ranks hold all: the same names on every rank."""
        return [self.names[parameter] for parameter in self.optimizer.fp16_groups[flat]]

    def group_of(self, flat: int) -> int:
        return self.optimizer.sub_group_to_group_id[flat]

    @contextlib.contextmanager
    def resident(self, flat: int, *, changes: bool) -> Iterator[bool]:
        if not self.optimizer._swappable_optimizer_subgroup(flat):
            yield False
            return
        self.optimizer._optimizer_states_and_gradient_swap_in(flat)
        try:
            yield True
        finally:
            if changes:
                self.optimizer._optimizer_states_and_gradient_swap_out(flat)
            else:
                self.optimizer._release_swap_buffers(flat)

    def finish_gradients(self) -> None:
        self.engine.set_gradient_accumulation_boundary(True)
        # all of them, also those that this step did not use: what is copied then is 0
        self.optimizer._offload_boundary_param_ids = {p.ds_id for group in self.optimizer.fp16_groups for p in group}
        self.optimizer.finalize_gradient_accumulation_boundary()

    def gradients(self) -> list[torch.Tensor]:
        return [self.optimizer.grad_partitions_flat_buffer]

    def held_gradients(self) -> Iterable[torch.Tensor]:
        return [*super().held_gradients(), *_grads(self.flats)]

    def drop(self) -> None:
        self.optimizer._pre_step()
        self.optimizer._partition_all_parameters()
        self.optimizer.zero_grad()
        if self.optimizer.offload_optimizer:
            self.optimizer.reset_cpu_buffers()
        else:
            self.optimizer.averaged_gradients = {}
        self._gather_persistent()
        self.forget()

    def forget(self) -> None:
        self.optimizer.grad_partitions_flat_buffer.zero_()

    def refresh(self) -> None:
        self.optimizer._partition_all_parameters()
        for number in range(len(self.flats)):
            with self.resident(number, changes=False):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(number)
        self._gather_persistent()

    def _gather_persistent(self) -> None:
        persistent = self.optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    def remove_hooks(self) -> None:
        super().remove_hooks()
        self.optimizer.parameter_offload.destroy()
        for hook in self.optimizer._leaf_module_hooks:
            hook.remove()


def _grads(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.grad for tensor in tensors if tensor.grad is not None]


def shards_of(engine: Any, names: Mapping[Any, str]) -> Shards:
    """What fits the optimizer that DeepSpeed has made for its stage and precision."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    kinds: dict[type, type[Shards]] = {
        BF16_Optimizer: Bf16Shards,
        DeepSpeedZeroOptimizer: FlatShards,
        DeepSpeedZeroOptimizer_Stage3: PartitionedShards,
    }
    return kinds.get(type(engine.optimizer), WholeShards)(engine, names)
