"""GaLore: full fine-tuning whose optimizer sees gradients projected to a few dimensions, and keeps state of those."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from swift_dist.config.finetune import AnyNames
from swift_dist.config.section import Section
from swift_dist.tuners.base import Strategy, Tuner

if TYPE_CHECKING:
    import torch


class Options(Section):
    rank: int = Field(128, gt=0, description="dimensions that a gradient is projected to")
    interval: int = Field(200, gt=0, description="updates after which a projection is computed anew")
    scale: float = Field(0.25, gt=0, description="factor of projected updates")
    side: Literal["short", "long", "left", "right"] = Field(
        "short", description="which side of a gradient is projected: its shorter, longer, left or right one"
    )
    targets: AnyNames = Field(
        ("*attn*", "*attention*", "*mlp*"), description="patterns of the matrices whose gradients are projected"
    )


class Galore(Tuner):
    name = "galore"
    summary = "gradients projected to few dimensions (GaLore, arXiv 2403.03507); beside full, freeze or llama_pro"
    is_addition = True
    contradicts = frozenset({"lora", "qlora", "adalora", "ia3", "lisa"})

    def refuses(self, strategy: Strategy, options: Options) -> str | None:
        if strategy != "ddp":
            return f"a projection is computed from a whole gradient, and {strategy} leaves each rank a piece of it"
        return None

    def optimizer(self, groups: list[dict[str, Any]], make: Any, options: Options) -> torch.optim.Optimizer:
        from swift_dist.tuners._projected import ProjectedOptimizer

        return ProjectedOptimizer(groups, make, options)


TUNER = Galore()
