"""Rotary frequencies that depend on a sequence's length (dynamic NTK, longrope), where a rank holds a part of the row.

transformers (`modeling_rope_utils.dynamic_rope_update`) takes the largest position that it is given for the length, and
chooses the frequencies by it: ranks that hold different parts of a row would turn the same token by different angles.
"""

from __future__ import annotations

from typing import Any

import torch

from swift_dist.sequence_parallel.group import SharedRow


def show_longest(model: torch.nn.Module) -> None:
    """Let the rotary embeddings of `model` that look at it see the largest position of the whole shared row."""
    longest = _Longest()
    seeing = [module for module in model.modules() if _depends_on_length(module)]
    for module in seeing:
        module.register_forward_pre_hook(longest.append, with_kwargs=True)
        module.register_forward_hook(longest.drop)
    if seeing:
        model.register_forward_pre_hook(longest.remember, with_kwargs=True)


def _depends_on_length(module: torch.nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)  # of all layers, or of each kind of layer
    named = kinds.values() if isinstance(kinds, dict) else (kinds,)
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in named)


class _Longest:
    """Hooks: a position more goes in, its angles are taken off what comes out."""

    def __init__(self) -> None:
        self._position = 0

    def remember(self, module: torch.nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        shared: SharedRow | None = named.get("shared_row")
        self._position = max(shared.row.lengths) - 1 if shared is not None else 0

    def append(
        self, module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "position_ids" in named:
            return arguments, {**named, "position_ids": self._with_longest(named["position_ids"])}
        hidden, positions, *others = arguments
        return (hidden, self._with_longest(positions), *others), named

    def _with_longest(self, positions: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(positions, (0, 1), value=self._position)

    def drop(self, module: torch.nn.Module, arguments: Any, output: Any) -> Any:
        """(cos, sin), or both as one complex tensor: [..., t + 1, d] -> [..., t, d]."""
        if isinstance(output, torch.Tensor):
            return output[..., :-1, :]
        return tuple(part[..., :-1, :] for part in output)
