"""(IA)^3: learnt factors on keys, values and the inputs of the second feed-forward matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from swift_dist.config.finetune import AnyNames, Names
from swift_dist.config.section import Section
from swift_dist.errors import JobError
from swift_dist.tuners._peft import AdapterTuner, task_type

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig


class Options(Section):
    target_modules: Names = Field(
        ("k_proj", "v_proj", "down_proj"), description="last words of the names of modules that get factors"
    )
    feedforward_modules: AnyNames = Field(
        ("down_proj",), description="those of target_modules whose inputs, not outputs, are scaled"
    )
    exclude_modules: AnyNames = Field((), description="last words of the names of modules that get none")


class IA3(AdapterTuner):
    name = "ia3"
    summary = "a factor for each key, value and feed-forward feature ((IA)^3, arXiv 2205.05638)"

    def peft_config(self, model: torch.nn.Module, options: Options, modules_to_save: list[str] | None) -> PeftConfig:
        from peft import IA3Config

        others = sorted(set(options.feedforward_modules) - set(options.target_modules))
        if others:
            raise JobError(
                "tuner.ia3.feedforward_modules",
                f"{', '.join(others)} is not among tuner.ia3.target_modules",
                "name it there, too, or leave it out here",
            )
        return IA3Config(
            task_type=task_type(model),
            target_modules=list(options.target_modules),
            feedforward_modules=list(options.feedforward_modules),
            exclude_modules=list(options.exclude_modules) or None,
            modules_to_save=modules_to_save,
        )


TUNER = IA3()
