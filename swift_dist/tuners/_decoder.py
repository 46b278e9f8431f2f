"""Where a model keeps the list of its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from swift_dist.errors import JobError

if TYPE_CHECKING:
    import torch


def text_config(model: Any) -> Any:
    """The config that counts the decoder's layers: the model's own, or its text part's."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def layers_of(model: torch.nn.Module, key: str) -> tuple[str, torch.nn.ModuleList]:
    """(name, list) of the decoder's layers: the outermost list of as many modules as the config counts layers.

    Raises:
        JobError: there is none; `key` is the tuner's name.
    """
    import torch

    count = getattr(text_config(model), "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise JobError(
            "tuner.name",
            f"{key} needs a list of {count} layers in the model, and {type(model).__name__} has none",
            "use another tuner, such as lora",
        )
    return min(lists, key=lambda item: item[0].count("."))
