"""What megatron-core 0.16.1 needs in order to run where there is no CUDA (and no transformer-engine): slots and
their replacements, as data.

The tables hold every change; `apply` installs them, imports the parts of megatron that they touch, and returns a
function that puts everything back. With CUDA the first table stays unused, with transformer-engine the second one.
Megatron asks for CUDA by name in a few hundred places, and on a machine without CUDA each of those calls can only
raise, so giving them a CPU meaning changes nobody else's behaviour.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from swift_dist.errors import RunError

MEGATRON_VERSION = "0.16.1"
"""The only version whose slots these are."""

Undo = Callable[[], None]
_ABSENT = object()


def apply() -> Undo:
    """Make megatron-core importable and usable on this machine; call it before the first import of megatron.

    Returns a function that restores every slot; a second call changes nothing and returns one that does nothing.

    Raises:
        RunError: another version of megatron-core is installed.
    """
    version = importlib.metadata.version("megatron-core")
    if version != MEGATRON_VERSION:
        raise RunError(
            f"megatron-core {version} is installed; the CPU shim is written for {MEGATRON_VERSION}",
            f"pip install megatron-core=={MEGATRON_VERSION}",
        )
    import torch

    undo = contextlib.ExitStack()
    if torch.cuda.Stream is _Stream:
        return undo.close
    if not torch.cuda.is_available():
        _replace(undo, _torch_slots())
        _import_megatron_without_compiler()
        _replace(undo, _megatron_slots())
    if importlib.util.find_spec("transformer_engine") is None:
        _replace(undo, _WITHOUT_TRANSFORMER_ENGINE)
    return undo.close


_WITHOUT_TRANSFORMER_ENGINE: dict[str, Any] = {
    # Only defined where transformer-engine imports, but read everywhere: NameError in the router.
    "megatron.core.transformer.moe.moe_utils:te_general_gemm": None,
    # Says True without transformer-engine, and then calls into it.
    "megatron.core.transformer.multi_latent_attention:HAVE_TE": False,
}


def _torch_slots() -> dict[str, Any]:
    """Slots of torch itself. `torch.cuda.x` cannot work here; `Tensor.cuda`/`type` are asked by megatron alone."""
    import torch

    cpu = torch.device("cpu")
    return {
        "torch.cuda:current_device": lambda: cpu,
        "torch.cuda:set_device": lambda device: None,
        "torch.cuda:synchronize": lambda device=None: None,
        "torch.cuda:get_rng_state": lambda device=None: torch.get_rng_state(),
        "torch.cuda:set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "torch.cuda:manual_seed": _seed_cpu_generator,
        "torch.cuda.random:get_rng_state": lambda device=None: torch.get_rng_state(),
        "torch.cuda.random:set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "torch.cuda:Stream": _Stream,
        "torch.cuda:Event": _Event,
        "torch.cuda:current_stream": lambda device=None: _Stream(),
        "torch.cuda:default_stream": lambda device=None: _Stream(),
        "torch.cuda:stream": lambda stream: contextlib.nullcontext(),
        "torch.Tensor:cuda": lambda self, *args, **kwargs: self,
        "torch.Tensor:type": _tensor_type(torch.Tensor.type),
    }


def _megatron_slots() -> dict[str, Any]:
    """Slots of megatron's modules, which are imported by now."""
    import torch

    cpu_torch = _CpuFactories(torch)
    slots: dict[str, Any] = {
        # Restores the generator of the device: here the CPU's. (Upstream avoids a clone; this does too.)
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state": (
            lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
        ),
        # gloo gathers and scatters equal shares only; experts get unequal ones.
        "megatron.core.tensor_parallel.mappings:_gather_along_first_dim": _gather_along_first_dim,
        "megatron.core.tensor_parallel.mappings:_reduce_scatter_along_first_dim": _reduce_scatter_along_first_dim,
        # Upstream's uses torch.norm, which on a CPU is the less exact the larger a tensor is.
        "megatron.core.optimizer.clip_grads:l2_norm_impl": _l2_norm,
        # CPU tensors pass through it unchanged, but the caller needs the split sizes as plain numbers.
        "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu": _tensor_on_cpu,
    }
    # Modules that create tensors with device="cuda" (or pinned) see a torch whose factories stay on the CPU.
    slots |= {f"{module}:torch": cpu_torch for module in _MODULES_THAT_CREATE_CUDA_TENSORS}
    return slots


_MODULES_THAT_CREATE_CUDA_TENSORS = (
    "megatron.core.utils",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.models.common.embeddings.rope_utils",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
)


def _replace(undo: contextlib.ExitStack, slots: Mapping[str, Any]) -> None:
    """Put each replacement into its slot `module[.Class]:name`; `undo` gets the way back."""
    for slot, replacement in slots.items():
        path, name = slot.split(":")
        owner = _resolve(path)
        undo.callback(_restore, owner, name, vars(owner).get(name, _ABSENT))
        setattr(owner, name, replacement)


def _resolve(path: str) -> Any:
    """The module `path`, or the class `path` of a module."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def _restore(owner: Any, name: str, value: Any) -> None:
    if value is _ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


def _import_megatron_without_compiler() -> None:
    """Import megatron with `torch.compile` as the identity, then give torch its compiler back.

    Megatron decorates its small fusions with it. There is nothing to gain from them without a GPU, and merely
    decorating imports the compiler: 2 s of start-up for every rank.
    """
    import torch

    compiler = torch.compile
    torch.compile = lambda model=None, **kwargs: model if model is not None else (lambda function: function)  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that apex and transformer-engine are missing, which is why this runs
            for name in ("megatron.core", *_MODULES_THAT_CREATE_CUDA_TENSORS):
                importlib.import_module(name)
            importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
            importlib.import_module("megatron.core.models.gpt.gpt_model")
            importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
            importlib.import_module("megatron.core.jit").disable_jit_fuser()
    finally:
        torch.compile = compiler


class _CpuFactories(types.ModuleType):
    """A copy of torch's namespace whose tensor factories read device="cuda" as the CPU and pin nothing."""

    _FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like")

    def __init__(self, torch: types.ModuleType) -> None:
        super().__init__(torch.__name__)
        vars(self).update(vars(torch))
        for name in self._FACTORIES:
            setattr(self, name, self._on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.modules["torch"], name)  # submodules that torch imports later

    @staticmethod
    def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
        def create(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "cpu"
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return create


class _Stream:
    """A stream on which everything has happened already. A class, because others subclass torch.cuda.Stream."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> _Event:
        return _Event()

    def synchronize(self) -> None: ...


class _Event:
    """An event that has happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _seed_cpu_generator(seed: int) -> None:
    import torch

    torch.default_generator.manual_seed(seed)


def _tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type`, which answers `torch.cuda.FloatTensor` where megatron asks (it compares with such names)."""

    def tensor_type(self: Any, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, non_blocking, **kwargs)
        name = original(self)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return name.replace("torch.", "torch.cuda.", 1) if caller.startswith("megatron.") else name

    return tensor_type


def _tensor_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    import torch

    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _l2_norm(chunk_size: int, overflow: Any, lists: list[list[Any]], per_tensor: bool, *args: Any) -> tuple[Any, None]:
    """[1], float32."""
    from swift_dist.optim.norm import sum_of_squares

    assert not per_tensor
    return sum_of_squares(tensor for tensors in lists for tensor in tensors).sqrt().float().view(1), None


def _gather_along_first_dim(
    input_: Any, group: Any, output_split_sizes: Iterable[int] | None = None, use_global_buffer: bool = False
) -> Any:
    """[n_r, ...] on rank r -> [sum of n_r, ...] on all; unequal shares are padded to the largest for the journey."""
    import torch

    if group.size() == 1:
        return input_
    input_ = input_.contiguous()
    if output_split_sizes is None:
        output = input_.new_empty((input_.shape[0] * group.size(), *input_.shape[1:]))
        torch.distributed.all_gather_into_tensor(output, input_, group=group)
        return output
    sizes = [int(size) for size in output_split_sizes]
    padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
    padded[: input_.shape[0]] = input_
    shares = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(shares, padded, group=group)
    return torch.cat([share[:size] for share, size in zip(shares, sizes, strict=True)])


def _reduce_scatter_along_first_dim(
    input_: Any, group: Any, input_split_sizes: Iterable[int] | None = None, use_global_buffer: bool = False
) -> Any:
    """[sum of n_r, ...] on all -> the sum's [n_r, ...] on rank r; unequal shares are reduced whole and sliced."""
    import torch

    if group.size() == 1:
        return input_
    if input_split_sizes is None:
        assert input_.shape[0] % group.size() == 0, "first dimension is not divisible by the group's size"
        output = input_.new_empty((input_.shape[0] // group.size(), *input_.shape[1:]))
        torch.distributed.reduce_scatter_tensor(output, input_.contiguous(), group=group)
        return output
    sizes = [int(size) for size in input_split_sizes]
    total = input_.clone()
    torch.distributed.all_reduce(total, group=group)
    start = sum(sizes[: group.rank()])
    return total[start : start + sizes[group.rank()]].contiguous()
