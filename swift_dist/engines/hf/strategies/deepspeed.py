"""DeepSpeed's ZeRO (Rajbhandari et al., https://arxiv.org/abs/1910.02054), with or without offload: CUDA + NCCL or
CPU + gloo.

DeepSpeed lays out weights, gradients and optimizer state, reduces and gathers. The engine decides the rest: gradients
are sums (DeepSpeed would divide by ranks and micro-batches), their norm is known before weights change, clipping and
the loss scale are computed here, and checkpoints are the engine's own instead of DeepSpeed's.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from swift_dist.engines.hf.strategies import _deepspeed_config as configuration
from swift_dist.engines.hf.strategies._clip import LossScale, clip_factor, sum_of_squares
from swift_dist.engines.hf.strategies._deepspeed_shards import Shards, shards_of
from swift_dist.engines.hf.strategies._deepspeed_start import (
    Traces,
    no_builds,
    partition_from_first_rank,
    prepare_nvme,
)
from swift_dist.engines.hf.strategies._deepspeed_state import ShardedWeights, weights_of
from swift_dist.engines.hf.strategies._deepspeed_used import UsedWeights
from swift_dist.engines.hf.strategies._first_rank import hand_out
from swift_dist.engines.hf.strategies._state import OptimizedWeights
from swift_dist.engines.hf.strategies._torch import DTYPES, num_bytes
from swift_dist.engines.hf.strategies.base import Setting
from swift_dist.engines.hf.strategies.ddp import Autocast
from swift_dist.engines.hf.tiled_mlp import gather_whole
from swift_dist.errors import JobError, RunError


class DeepSpeed:
    """See `swift_dist.engines.hf.strategies.base.Strategy`.

    Args:
        model: whole weights on the CPU, the same on every rank: fp32, or the compute precision for frozen ones. With
            ``setting.from_first_rank`` (stage 3) only the first one has them.
        setting: see there.

    Raises:
        JobError: the configuration contradicts the job, or the device cannot compute in its precision.
        RunError: a weight that learns lies on the meta device, or offload to NVMe cannot be compiled.
    """

    def __init__(self, model: torch.nn.Module, setting: Setting) -> None:
        self.job, self.device = setting.job, setting.device
        ranks = dist.get_world_size()
        if setting.group is not None and dist.get_world_size(setting.group) != ranks:
            raise JobError(
                configuration.KEY, "DeepSpeed shards over all ranks", "use strategy.fsdp for shards over some of them"
            )
        if not setting.from_first_rank and any(parameter.is_meta for parameter in model.parameters()):
            raise RunError("DeepSpeed takes a model with its weights, and this one is on the meta device")
        self.config = configuration.settings(self.job, hidden_size=_hidden_size(model), data_parallel_size=ranks)
        self._model, self._ranks = model, ranks
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._traces = Traces(self.device)
        try:
            self._initialize(setting)
        except BaseException:
            self._traces.undo()
            raise
        self.module: torch.nn.Module = _with_modes(self._engine)
        self._used = UsedWeights(model) if self._shards.reduces_in_backward else None
        fp16 = self.job.train.precision == "fp16"
        self._scale = LossScale(self.job.train.initial_loss_scale) if fp16 else None
        self._reduced = False
        self._last_norm: float | None = None
        self._most_gradients = 0

    def _initialize(self, setting: Setting) -> None:
        model, stage = self._model, self.config["zero_optimization"].get("stage", 0)
        precision = self.job.train.precision
        whole = {n: p.data for n, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float32}
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        if stage and precision == "fp16" and not get_accelerator().is_fp16_supported():
            raise JobError("train.precision", f"DeepSpeed has no fp16 on {self.device.type}", "use bf16 or fp32")
        prepare_nvme(self.config, precision)
        if stage == 3:
            gather_whole(model)
        called = model if stage or precision == "fp32" else Autocast(model, self.device.type, DTYPES[precision])
        optimizer = setting.make_optimizer(setting.parameter_groups(model))
        with no_builds():
            if setting.from_first_rank:
                partition_from_first_rank(model, self.config, self.device)
            self._engine = deepspeed.initialize(model=called, optimizer=optimizer, config=self.config)[0]
        self._shards: Shards = shards_of(self._engine, self._names)
        if stage and precision != "fp32":
            self._take_masters(whole, setting.from_first_rank)

    def _take_masters(self, whole: dict[str, torch.Tensor], from_first_rank: bool) -> None:
        """DeepSpeed made fp32 masters of weights that it had rounded before: take the model's own numbers."""
        for number, flat in enumerate(self._shards.flats):
            pieces = {piece.name: piece for piece in self._shards.pieces if piece.flat == number}
            with self._shards.resident(number, changes=True):
                for name in (name for name in self._shards.names_in(number) if name in whole):
                    if from_first_rank:
                        hand_out([whole[name]], self.device)
                    if name in pieces:
                        numbers, piece = whole[name].reshape(-1), pieces[name]
                        piece.of(flat).copy_(numbers.narrow(0, piece.start, piece.length))
                    del whole[name]

    @property
    def loss_scale(self) -> float | None:
        return None if self._scale is None else self._scale.value

    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        # Stages 2 and 3 reduce in every backward pass (they keep no whole gradients), 0 and 1 after the last one.
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.set_gradient_accumulation_boundary(False)
        # DeepSpeed divides by the number of ranks
        self._engine.backward(loss * (self._ranks * (self.loss_scale or 1.0)), scale_wrt_gas=False)

    @torch.no_grad()
    def gradient_norm(self) -> float:
        self._require_the_same_learns()
        self._note_gradients()
        if not self._reduced:
            self._shards.finish_gradients()
            self._reduced = True
        self._note_gradients()
        squares = sum_of_squares(self._shards.gradients(), self.device)
        if not self._shards.is_replicated:
            used = self._used.digest() if self._used else 0
            numbers = torch.stack([squares, *squares.new_tensor([used, used**2])])
            dist.all_reduce(numbers)
            squares, digests, of_squares = numbers
            if self._ranks * of_squares.item() != digests.item() ** 2:  # their variance is not 0
                raise RunError(
                    "the ranks' rows used different weights, whose gradients ZeRO 2 and 3 would add to one another",
                    "use strategy.deepspeed: zero1, or strategy.fsdp: fsdp2",
                )
        self._last_norm = math.sqrt(squares.item()) / (self.loss_scale or 1.0)
        return self._last_norm

    def update(self, lr: float, gradient_norm: float) -> None:
        assert self._reduced, "gradient_norm comes first"
        for group in self._engine.basic_optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self._shards.step(clip_factor(gradient_norm, self.job.optimizer.clip_grad) / (self.loss_scale or 1.0))
        if not self._engine.was_step_applied():
            raise RunError("DeepSpeed left out an update although the gradients are finite")
        if self._scale is not None:
            self._scale.after_update()
        self._reduced, self._last_norm = False, None

    def skip(self) -> None:
        if self._scale is not None and self._last_norm is not None and not math.isfinite(self._last_norm):
            self._scale.after_overflow()
        self._shards.drop()
        if self._used:
            self._used.reset()
        self._reduced, self._last_norm = False, None

    def _require_the_same_learns(self) -> None:
        """ZeRO lays its flat tensors out once, for the weights that learn at that moment.

        Raises:
            RunError: others learn now (LISA).
        """
        if [name for name, parameter in self._names_in_order() if parameter.requires_grad] != self._learning:
            raise RunError(
                "the weights that learn have changed since the start, and DeepSpeed laid out its state for those",
                "use strategy ddp or fsdp2 with this tuner",
            )

    def _names_in_order(self) -> Iterable[tuple[str, torch.Tensor]]:
        return ((name, parameter) for parameter, name in self._names.items())

    def _note_gradients(self) -> None:
        self._most_gradients = max(self._most_gradients, num_bytes(self._shards.held_gradients()))

    def sharded_state(self, is_loading: bool) -> dict[str, Any]:
        state = self._weights().collect(is_loading)
        counts = state.pop("counts")
        return {**state, "numbers": {"counts": counts, "loss_scale": self._scale and self._scale.state()}}

    def load_sharded_state(self, state: dict[str, Any]) -> None:
        numbers = state["numbers"]
        self._weights().take_over(state, numbers["counts"])
        if self._scale is not None and numbers["loss_scale"] is not None:
            self._scale.load(numbers["loss_scale"])

    def _weights(self) -> ShardedWeights | OptimizedWeights:
        optimizer = self._engine.basic_optimizer
        return weights_of(self._model, self._shards, optimizer, self._learning, dist.get_rank())

    @torch.no_grad()
    def whole_weights(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        buffers = dict(self._model.named_buffers(remove_duplicate=False))
        for name in names:
            tensor = parameters[name] if name in parameters else buffers[name]
            with self._gathered(tensor):
                whole = tensor.detach().to("cpu", copy=True) if dist.get_rank() == 0 else None
            if whole is not None:
                yield name, whole

    def _gathered(self, tensor: torch.Tensor) -> AbstractContextManager[Any]:
        if not hasattr(tensor, "ds_id"):
            return contextlib.nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters([tensor])

    def held_bytes(self) -> dict[str, int]:
        parameters = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in self._model.parameters()]
        gathered = [p for p in self._model.parameters() if hasattr(p, "ds_tensor")]  # those that are whole all the time
        held = [*parameters, *gathered]
        known = {tensor.untyped_storage().data_ptr() for tensor in held}
        masters = [flat for flat in self._shards.flats if flat.untyped_storage().data_ptr() not in known]
        state = [t for s in self._engine.basic_optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        return {
            "parameters": num_bytes(held),
            "gradients": self._most_gradients,
            "optimizer": num_bytes([*masters, *state]),
        }

    def close(self) -> None:
        if "_engine" not in self.__dict__:
            return
        engine = self.__dict__.pop("_engine")
        self.__dict__.pop("_shards").remove_hooks()
        if self._used:
            self._used.close()
        for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
            hook.remove()
        # DeepSpeed's own `destroy`, which runs when the engine is collected too, waits for the device: a collective
        # that a dead peer left open would hold it for ever.
        engine.optimizer = None
        engine.basic_optimizer.state.clear()
        engine.basic_optimizer.param_groups.clear()
        for name in ("module", "_model", "_names"):
            self.__dict__.pop(name)
        self._traces.undo()


def _with_modes(engine: Any) -> Any:
    """DeepSpeed's engine leaves its own ``training`` as it was: whoever reads it, to put it back, sees no change."""

    def train(mode: bool = True) -> Any:
        engine.module.train(mode)
        engine.training = mode
        return engine

    engine.train, engine.eval = train, lambda: train(False)
    return engine


def _hidden_size(model: torch.nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    size = getattr(config, "hidden_size", None)
    return size if isinstance(size, int) else None


STRATEGY = DeepSpeed
