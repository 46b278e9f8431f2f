"""Slots: the parts of a model that kernels of this room compute, and kernels put there and taken away again.

A part is known by what it computes, not by its name: transformers has hundreds of classes of norms and MLPs, copies of
one another, and a few that look alike and are not (a scale, a clamp, another order of rounding). So a slot asks the
module's own class: a stand-in of it with small random weights must give what the kernel's plain-torch reference gives,
in every mix of float32 and bfloat16, dtypes included, and in bfloat16 to the last bit. One table therefore serves every
family, and a class that is not known yet is either computed right or left alone.

What is replaced is an attribute of one module (its `forward`, or the gate of its experts), never a class or a function
of a library. Hooks that strategies hang on modules (FSDP2's and ZeRO-3's gathering of weights) go on as they are, as do
adapters on the projections of an MLP, which are called as before. `install` returns the record by which `undo` restores
exactly what was there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from swift_dist.kernels import rms_norm, rope, swiglu
from swift_dist.kernels._triton import Backend

_DTYPES = (torch.float32, torch.bfloat16)
_EPS = ("variance_epsilon", "eps")
_NORMS = ((0.0, True), (0.0, False), (1.0, False))  # (offset, rounds_before_weight): llama, OLMo 2, Gemma
_SPLIT = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_FUSED = ("gate_up_proj", "down_proj")
_ROPE = "apply_rotary_pos_emb"
_INTERNAL = frozenset(vars(nn.Module()))
_SCALES = (1.0, 30.0, 3000.0)  # of gates: a clamp would show
_Function = Callable[..., Any]


@dataclass(frozen=True)
class Slot:
    """One kernel's place.

    Args:
        kernel: name of its file.
        attribute: of the module, which is replaced.
        fill: (module, backend) -> what takes the attribute's place, called with the module first; None: this module
            computes something else.
        is_of_class: whether all modules of a class have the same answer, whatever their attributes are.
    """

    kernel: str
    attribute: str
    fill: Callable[[nn.Module, Backend], _Function | None]
    is_of_class: bool = False


@dataclass(frozen=True)
class Filled:
    """A kernel in its place: `attribute` of `module`, which is called `name` in the model."""

    kernel: str
    name: str
    module: nn.Module
    attribute: str
    method: MethodType


def install(model: nn.Module, backend: Backend = "auto") -> list[Filled]:
    """Put kernels into every slot of a model.

    Args:
        model: of transformers, with or without adapters; its weights are not looked at and may be anywhere.
        backend: of the kernels.

    Returns:
        What was filled, for `undo`. Attributes that somebody else has replaced already are left alone.
    """
    known: dict[Any, _Function | None] = {}
    filled = []
    for name, module in model.named_modules():
        for slot in SLOTS:
            if slot.attribute in vars(module):
                continue
            key = (slot.fill, type(module), () if slot.is_of_class else _attributes(module))
            if key not in known:
                known[key] = slot.fill(module, backend)
            function = known[key]
            if function is not None:
                # a bound method: a copy of the module (PEFT makes them) gets one that is bound to the copy
                method = vars(module)[slot.attribute] = MethodType(function, module)
                filled.append(Filled(slot.kernel, name, module, slot.attribute, method))
    return filled


def undo(filled: Iterable[Filled]) -> None:
    """Give the modules back what they had: the attribute of their class.

    Raises:
        RuntimeError: somebody has replaced one of them since; what was put on top is taken away first.
    """
    for place in filled:
        if vars(place.module).get(place.attribute) is not place.method:
            raise RuntimeError(f"{place.name}.{place.attribute} is no longer the kernel that was put there")
        del vars(place.module)[place.attribute]


def _attributes(module: nn.Module) -> tuple[Any, ...]:
    """What two modules of one class may differ in besides their weights; other objects than numbers by identity."""
    found: list[Any] = [name for name, _ in _own_weights(module)]
    for name, value in sorted(vars(module).items()):
        if name not in _INTERNAL:
            found.append((name, value if isinstance(value, (bool, int, float, str, type(None))) else id(value)))
    for name, child in module.named_children():
        has_weights = next(child.parameters(), None) is not None
        found.append((name, type(child), () if has_weights else _attributes(child)))
    return tuple(found)


def _own_weights(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _takes_one(function: _Function) -> bool:
    """Whether a method takes one argument and nothing else."""
    parameters = list(inspect.signature(function).parameters.values())
    return len(parameters) == 2 and parameters[1].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def _stand_in(module: nn.Module, **parts: Any) -> Any:
    """A module of the same class and attributes, whose weights are `parts`."""
    twin: Any = object.__new__(type(module))
    nn.Module.__init__(twin)
    vars(twin).update({name: value for name, value in vars(module).items() if name not in _INTERNAL})
    for name, child in module.named_children():
        if name not in parts:
            twin.add_module(name, child)
    for name, part in parts.items():
        setattr(twin, name, part)
    return twin


def _random(seed: int, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Drawn from a generator of its own: the global one is the job's."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * scale).to(dtype)


def _linear(seed: int, inputs: int, outputs: int, dtype: torch.dtype, scale: float = 1.0) -> nn.Linear:
    linear = nn.utils.skip_init(nn.Linear, inputs, outputs, device="cpu", dtype=dtype)
    linear.weight = nn.Parameter(_random(seed, outputs, inputs, dtype=dtype, scale=scale))
    linear.bias = nn.Parameter(_random(seed + 1, outputs, dtype=dtype))
    return linear


def _same(call: Callable[[], Any], expected: torch.Tensor) -> bool:
    """Whether a class gives what a reference gives. One that cannot be called so computes something else."""
    try:
        with torch.no_grad():
            found = call()
    except Exception:
        return False
    if not isinstance(found, torch.Tensor) or found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if found.dtype == torch.float32:
        return torch.allclose(found, expected, rtol=2e-6, atol=1e-6)
    return torch.equal(found, expected)


def _fill_norm(module: nn.Module, backend: Backend) -> _Function | None:
    """RMSNorm, in one of three orders of rounding."""
    names = [name for name in _EPS if isinstance(getattr(module, name, None), float)]
    weights = list(_own_weights(module))
    alone = next(module.children(), None) is None
    if not alone or len(names) != 1 or [name for name, _ in weights] != ["weight"] or weights[0][1].dim() != 1:
        return None
    own, eps_name = type(module).forward, names[0]
    if not _takes_one(own):
        return None
    for offset, rounds in _NORMS:
        if all(_is_norm(module, own, getattr(module, eps_name), offset, rounds, *dtypes) for dtypes in _mixes()):

            def forward(
                self: Any, hidden_states: torch.Tensor, offset: float = offset, rounds: bool = rounds
            ) -> torch.Tensor:
                return rms_norm.rms_norm(
                    hidden_states,
                    self.weight,
                    getattr(self, eps_name),
                    offset=offset,
                    rounds_before_weight=rounds,
                    backend=backend,
                )

            return forward
    return None


def _mixes() -> Iterable[tuple[torch.dtype, ...]]:
    """Of activations and weights: autocast and adapters bring all of them about."""
    return product(_DTYPES, _DTYPES)


def _is_norm(
    module: nn.Module, own: _Function, eps: float, offset: float, rounds: bool, x_dtype: torch.dtype, dtype: torch.dtype
) -> bool:
    weight = _random(0, 24, dtype=dtype)
    # rows small enough for eps to matter, and large ones
    x = _random(1, 3, 8, 24, dtype=torch.float32) * torch.logspace(-4, 2, 8)[:, None]
    x = x.to(x_dtype)
    twin = _stand_in(module, weight=nn.Parameter(weight))
    expected = rms_norm.reference(x, weight, eps, offset=offset, rounds_before_weight=rounds)
    return _same(lambda: own(twin, x), expected)


def _fill_mlp(module: nn.Module, backend: Backend) -> _Function | None:
    """An MLP of three projections, two of which may be one: down(silu(gate) up)."""
    children = dict(module.named_children())
    names = next((names for names in (*_SPLIT, _FUSED) if set(names) <= set(children)), None)
    own = type(module).forward
    if names is None or list(_own_weights(module)) or not _takes_one(own):
        return None
    others = [child for name, child in children.items() if name not in names]
    if any(next(child.parameters(), None) is not None for child in others) or len(others) > 1:
        return None

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = _gate_and_up(self, names, x)
        result: torch.Tensor = getattr(self, names[-1])(swiglu.swiglu(gate, up, backend=backend))
        return result

    alike = all(_is_mlp(module, own, names, dtype, scale) for dtype in _DTYPES for scale in _SCALES)
    return forward if alike else None


def _gate_and_up(module: Any, names: tuple[str, ...], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if len(names) == 3:
        return getattr(module, names[0])(x), getattr(module, names[1])(x)
    gate_up: torch.Tensor = getattr(module, names[0])(x)
    return gate_up.chunk(2, dim=-1)


def _is_mlp(module: nn.Module, own: _Function, names: tuple[str, ...], dtype: torch.dtype, scale: float) -> bool:
    width, inner = 8, 12
    if len(names) == 3:
        linears = [
            _linear(0, width, inner, dtype, scale),
            _linear(2, width, inner, dtype),
            _linear(4, inner, width, dtype),
        ]
    else:
        linears = [_linear(0, width, 2 * inner, dtype, scale), _linear(4, inner, width, dtype)]
    twin = _stand_in(module, **dict(zip(names, linears, strict=True)))
    twin.training = True  # what it drops would show
    x = _random(7, 2, 6, width, dtype=dtype)
    with torch.no_grad():
        gate, up = _gate_and_up(twin, names, x)
        # in units of the result, so that one tolerance does for all scales
        expected = linears[-1](swiglu.reference(gate, up))
    size = expected.abs().max() if dtype == torch.float32 else 1.0
    return _same(lambda: own(twin, x) / size, expected / size)


def _fill_experts(module: nn.Module, backend: Backend) -> _Function | None:
    """The gate of experts that lie in one tensor, where the way in which they are computed calls it."""
    own = getattr(type(module), "_apply_gate", None)
    if own is None or not _takes_one(own) or not _calls_gate(module):
        return None
    if not all(_is_gate(module, own, dtype, scale) for dtype, scale in product(_DTYPES, _SCALES)):
        return None

    def apply_gate(self: Any, gate_up_out: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up_out.chunk(2, dim=-1)
        return swiglu.swiglu(gate, up, backend=backend)

    return apply_gate


def _is_gate(module: nn.Module, own: _Function, dtype: torch.dtype, scale: float) -> bool:
    gate_up = _random(0, 6, 24, dtype=dtype, scale=scale)
    expected = swiglu.reference(*gate_up.chunk(2, dim=-1))
    return _same(lambda: own(module, gate_up) / scale**2, expected / scale**2)


def _calls_gate(module: nn.Module) -> bool:
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", None) or "eager"
    return chosen != "eager" or "_apply_gate" in inspect.unwrap(type(module).forward).__code__.co_names


def _fill_rope(module: nn.Module, backend: Backend) -> _Function | None:
    """Attention whose forward rotates queries and keys by a function of its file: the same code, seeing another one."""
    own = type(module).forward
    if not isinstance(own, FunctionType) or _ROPE not in own.__code__.co_names:
        return None
    function = own.__globals__.get(_ROPE)
    if function is None or list(inspect.signature(function).parameters)[4:] not in ([], ["unsqueeze_dim"]):
        return None
    keeps_dtype = next((keeps for keeps in (False, True) if _is_rope(function, keeps)), None)
    if keeps_dtype is None:
        return None

    def rotate(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if unsqueeze_dim != 1 or cos.dim() != 3 or cos.shape[-1] != q.shape[-1]:  # a part of each head, or other axes
            result: tuple[torch.Tensor, torch.Tensor] = function(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
            return result
        query, key = rope.rope(q, k, cos, sin, backend=backend)
        return (query.to(q.dtype), key.to(k.dtype)) if keeps_dtype else (query, key)

    seen = {**own.__globals__, _ROPE: rotate}
    forward = FunctionType(own.__code__, seen, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__, forward.__qualname__ = own.__kwdefaults__, own.__qualname__
    forward.__annotations__, forward.__module__ = own.__annotations__, own.__module__
    return forward


def _is_rope(function: _Function, keeps_dtype: bool) -> bool:
    for x_dtype, dtype in _mixes():
        query, key = (_random(heads, 2, heads, 5, 8, dtype=x_dtype) for heads in (4, 2))
        cos, sin = (_random(seed, 2, 5, 8, dtype=dtype) for seed in (5, 6))
        expected = rope.reference(query, key, cos, sin)
        if keeps_dtype:
            expected = expected[0].to(x_dtype), expected[1].to(x_dtype)
        calls = [lambda i=i, held=(query, key, cos, sin): function(*held)[i] for i in (0, 1)]  # type: ignore[misc]
        if not all(_same(call, right) for call, right in zip(calls, expected, strict=True)):
            return False
    return True


SLOTS = (
    Slot("rms_norm", "forward", _fill_norm),
    Slot("swiglu", "forward", _fill_mlp),
    Slot("swiglu", "_apply_gate", _fill_experts),
    Slot("rope", "forward", _fill_rope, is_of_class=True),
)
"""Which part of a model each kernel computes."""
