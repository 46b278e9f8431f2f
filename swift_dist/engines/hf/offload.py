"""The inputs of recomputed layers in the host's memory, brought back ahead of use.

Where layers are recomputed (Chen et al., arXiv 1604.06174), all that a layer keeps is its input: layers x tokens x h
numbers, the largest part of what a long row needs (ALST, arXiv 2506.13996, moves them to the host, too). On CUDA the
copies run on a stream of their own: out while the next layers compute, and back while the layer above is
differentiated, so two of them lie on the device at a time. (transformers' own ``offload`` copies on the computing
stream.) On a CPU the same code copies between places of the same memory, which saves nothing.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

log = logging.getLogger(__name__)


def install(model: torch.nn.Module, device: torch.device) -> None:
    """Let the layers' checkpoint function keep its tensors in the host's memory.

    Args:
        model: with activation checkpointing switched on, and with all its layers (after tuners).
        device: on which it computes.
    """
    if device.type == "cpu":
        log.warning("train.offload_activations saves nothing on a CPU: what it moves is in the host's memory already")
    host = HostMemory()
    module: Any
    for module in model.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None:
            module._gradient_checkpointing_func = _Offloading(checkpoint, host)


class _Offloading:
    """In the place of a checkpoint function.

    The hooks see what the function itself saves, the tensors among its arguments; what is saved within it is the
    function's affair, and nothing outside of it is touched: no weight, no logits.
    """

    def __init__(self, checkpoint: Callable[..., Any], host: HostMemory) -> None:
        self._checkpoint, self._host = checkpoint, host

    def __call__(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        with saved_tensors_hooks(self._host.pack, self._host.unpack):
            return self._checkpoint(function, *arguments, **named)


class HostMemory:
    """Takes tensors in the order of the forward pass and gives them back in the other one.

    The graph alone holds what is packed: where a step fails, it goes with the graph.
    """

    def __init__(self) -> None:
        self._newest: weakref.ref[_Held] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def pack(self, tensor: torch.Tensor) -> _Held | torch.Tensor:
        """Begin to copy it to the host; integers (positions) and weights stay where they are."""
        if isinstance(tensor, torch.nn.Parameter) or not tensor.is_floating_point() or not tensor.numel():
            return tensor
        held = _Held(tensor, self._newest, self._stream(tensor.device))
        self._newest = weakref.ref(held)
        return held

    def unpack(self, held: _Held | torch.Tensor) -> torch.Tensor:
        """The tensor where it was; the one that was packed before it sets out."""
        if isinstance(held, torch.Tensor):
            return held
        tensor = held.arrived()
        before = None if held.before is None else held.before()
        if before is not None:
            before.set_out()
        return tensor

    def _stream(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class _Held:
    """A tensor in the host's memory.

    Args:
        tensor: to be copied.
        before: the one that was packed before it, whose turn is next in the backward pass.
        stream: of the copies; None: they are not asynchronous.
    """

    def __init__(
        self, tensor: torch.Tensor, before: weakref.ref[_Held] | None, stream: torch.cuda.Stream | None
    ) -> None:
        self.before, self._device, self._stream = before, tensor.device, stream
        self._back: torch.Tensor | None = None
        self._host = host_like(tensor)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(tensor.device))  # what computes the tensor
            tensor.record_stream(stream)  # its memory is not given away before it is copied
        with self._on_stream():
            self._host.copy_(tensor, non_blocking=True)

    def set_out(self) -> None:
        """Begin to copy it back."""
        if self._back is None:
            with self._on_stream():
                self._back = self._host.to(self._device, non_blocking=True)

    def arrived(self) -> torch.Tensor:
        """The tensor on its device, for the current stream. (A second backward pass copies it once more.)"""
        self.set_out()
        tensor, self._back = self._back, None
        assert tensor is not None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            tensor.record_stream(current)
        return tensor

    def _on_stream(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def host_like(tensor: torch.Tensor) -> torch.Tensor:
    """Room for a tensor in the host's memory: pinned, so that copies do not wait; where it cannot be pinned (a limit on
    locked memory, no GPU), ordinary, and copies take their time."""
    try:
        return torch.empty_like(tensor, device="cpu", pin_memory=True)
    except RuntimeError:
        return torch.empty_like(tensor, device="cpu", pin_memory=False)
