"""LLaMA-Pro: new layers between the old ones, which alone learn."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from swift_dist.config.section import Section
from swift_dist.errors import JobError
from swift_dist.tuners._decoder import layers_of, text_config
from swift_dist.tuners._export import write_model
from swift_dist.tuners._patterns import matching
from swift_dist.tuners.base import Tuner

if TYPE_CHECKING:
    import torch

_LAST = ("o_proj", "down_proj")  # what a layer adds to its input comes out of these two


class Options(Section):
    blocks: int = Field(4, gt=0, description="new layers")
    groups: int | None = Field(
        None, gt=0, description="groups of old layers, each followed by blocks / groups new ones (default: blocks)"
    )


class LlamaPro(Tuner):
    name = "llama_pro"
    summary = "new layers between the old ones, which alone learn (LLaMA Pro, arXiv 2401.02415)"

    def apply(
        self, model: torch.nn.Module, options: Options, *, seed: int, trainable: Sequence[str] = ()
    ) -> torch.nn.Module:
        """Insert copies of the last layer of each group that add nothing to their input yet: the model computes what it
        did. Layers and config count the new ones from here on.

        Raises:
            JobError: the old layers cannot be shared out over the groups, or this kind of model cannot be extended.
        """
        import torch

        model.requires_grad_(False)
        name, layers = layers_of(model, self.name)
        groups = options.groups or options.blocks
        if len(layers) % groups or options.blocks % groups:
            raise JobError(
                "tuner.llama_pro.blocks",
                f"{len(layers)} layers and {options.blocks} new ones cannot be shared out over {groups} groups",
                f"choose tuner.llama_pro.groups so that it divides both (default: blocks), such as {len(layers)}",
            )
        per_group, added = len(layers) // groups, options.blocks // groups
        extended: list[torch.nn.Module] = []
        origins: list[int] = []  # of each layer, the old one it is or copies
        new: list[int] = []
        for index, layer in enumerate(layers):
            extended.append(layer)
            origins.append(index)
            if (index + 1) % per_group == 0:
                for _ in range(added):
                    new.append(len(extended))
                    extended.append(_silent_copy(layer))
                    origins.append(index)
        for index, layer in enumerate(extended):
            for module in layer.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    setattr(module, "layer_idx", index)  # of caches  # noqa: B010
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, torch.nn.ModuleList(extended))
        _extend_config(model, origins)
        _check_config(model)
        for index in new:
            extended[index].requires_grad_(True)
        parameters = dict(model.named_parameters())
        for chosen in matching(parameters, trainable, "tuner.trainable"):
            parameters[chosen].requires_grad_(True)
        return model

    def export(
        self, model: torch.nn.Module, weights: dict[str, torch.Tensor], options: Any, folder: Path, max_shard_size: str
    ) -> None:
        write_model(model, weights, folder, max_shard_size)


def _silent_copy(layer: torch.nn.Module) -> torch.nn.Module:
    """A copy of a decoder layer whose attention and feed-forward part give 0, so that its residual passes through."""
    import torch

    new = copy.deepcopy(layer)
    silenced = set()
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            for last in _LAST:
                if last in name.split("."):
                    parameter.zero_()
                    silenced.add(last)
    if silenced != set(_LAST):
        raise JobError(
            "tuner.name",
            f"llama_pro knows no layers without {' and '.join(_LAST)}, and {type(layer).__name__} is one",
            "use another tuner, such as freeze or lora",
        )
    return new


def _extend_config(model: torch.nn.Module, origins: list[int]) -> None:
    """Count the new layers, and give each the kind (``layer_types``) of the one that it copies."""
    config = text_config(model)
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(origins)
    if kinds is not None:
        config.layer_types = [kinds[origin] for origin in origins]


def _check_config(model: Any) -> None:
    """Refuse a model whose new config describes another one: its export could not be loaded.

    So it is where the config says in a way of its own which layers are dense, or have experts.
    """
    import torch

    with torch.device("meta"):
        described = type(model)(copy.deepcopy(model.config))
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in described.state_dict().items()}
    if ours != theirs:
        differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise JobError(
            "tuner.name",
            f"llama_pro cannot extend a {type(model).__name__}: its config gives layers other shapes by their number "
            f"({differing[0]})",
            "use another tuner, such as freeze or lora",
        )


TUNER = LlamaPro()
