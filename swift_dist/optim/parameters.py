"""The parameter groups of a torch model for the hf engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from swift_dist.config.job import OptimizerSection
from swift_dist.optim.groups import decays

if TYPE_CHECKING:
    import torch


def parameter_groups(
    module: torch.nn.Module, section: OptimizerSection, lr_scale: Callable[[str], float]
) -> list[dict[str, Any]]:
    """Groups of the parameters that learn, as torch's optimizers take them.

    Args:
        module: its names are those that `lr_scale` and `decays` see; tied parameters count once, by their first name.
        section: of the job.
        lr_scale: from a name to that parameter's learning rate as a multiple of the job's.

    Returns:
        dicts with ``params``, ``names`` (in the same order), ``weight_decay``, ``lr_scale`` and ``is_hidden_matrix``:
        two-dimensional, and neither an embedding nor the head (what Muon is made for).
    """
    outside = _embeddings_and_head(module)
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = decays(name, parameter.shape, decay_norm_and_bias=section.decay_norm_and_bias)
        is_hidden_matrix = parameter.dim() == 2 and id(parameter) not in outside
        settings = (section.weight_decay if decay else 0.0, lr_scale(name), is_hidden_matrix)
        keys = ("weight_decay", "lr_scale", "is_hidden_matrix")
        group = groups.setdefault(settings, {"params": [], "names": [], **dict(zip(keys, settings, strict=True))})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _embeddings_and_head(module: torch.nn.Module) -> set[int]:
    """Identities of weights of embeddings, and of what turns the last hidden state into logits or scores."""
    import torch

    found = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, torch.nn.Embedding)
        for parameter in part.parameters(recurse=False)
    }
    heads = [part for name, part in module.named_modules() if name.rpartition(".")[2] in _HEADS]
    return found | {id(parameter) for head in heads for parameter in head.parameters()}


_HEADS = frozenset({"lm_head", "embed_out", "score", "classifier"})
"""Names that transformers gives to heads of causal and classification models."""
