"""The sections that only fine-tuning reads."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from swift_dist.config.section import Section


class TemplateSection(Section):
    system: str | None = Field(None, description="system message of conversations that bring none")
    agent: Literal["none", "react", "hermes", "toolbench", "qwen"] = Field(
        "none", description="how tools are written into the conversation (none: as the model's chat template does)"
    )
    loss_scale: Literal["default", "last_round", "all", "react", "hermes", "agentflan", "alpha_umi"] = Field(
        "default", description="which tokens learn, and how much (default: what the assistant would generate)"
    )
    thinking: Literal["keep", "drop"] = Field(
        "keep", description="thinking blocks of the turns that learn (earlier turns: as the template does)"
    )
    rewritten_turns: Literal["apart", "refuse"] = Field(
        "apart",
        description="answers that the chat template rewrites when more messages follow: learn each from a sample of "
        "its own that ends with it, or leave the row out",
    )
    truncation: Literal["delete", "left", "right", "split"] = Field(
        "delete",
        description="a sequence longer than data.sequence_length: leave it out, cut its beginning or its end, or make "
        "several of it",
    )
    date: str | None = Field(
        None,
        pattern=r"^\d{4}-\d{2}-\d{2}$",
        description="YYYY-MM-DD, for chat templates that write a date (default: the day on which the run begins)",
    )


class StrategySection(Section):
    fsdp: Literal["fsdp2"] | None = Field(None, description="shard weights, gradients and optimizer with FSDP2")
    deepspeed: str | None = Field(
        None,
        description="shard with DeepSpeed: zero0, zero1, zero2, zero3, zero2_offload, zero3_offload, "
        "zero3_nvme, or a JSON file of your own",
    )
    reshard_after_forward: bool = Field(True, description="FSDP2: give gathered weights back after the forward")
    hybrid_shard_size: int | None = Field(
        None, gt=1, description="FSDP2: shard over this many ranks and replicate over the others (HSDP)"
    )
    cpu_offload: bool = Field(False, description="FSDP2: keep weights and optimizer in the host's memory")
    nvme_path: str | None = Field(None, description="DeepSpeed: folder on a local disk for zero3_nvme")

    @model_validator(mode="after")
    def _one(self) -> StrategySection:
        if self.fsdp and self.deepspeed:
            raise ValueError("give strategy.fsdp or strategy.deepspeed, not both")
        return self

    @property
    def name(self) -> Literal["ddp", "fsdp2", "deepspeed"]:
        if self.deepspeed:
            return "deepspeed"
        return "fsdp2" if self.fsdp else "ddp"


_BETWEEN_NAMES = re.compile(r"[,\s]+(?![^\[]*\])")  # not within the brackets of a pattern: layers.[0,3]


def _as_names(value: Any) -> Any:
    """One text, or each of a list, may hold several names, such as a command line's ``q_proj,v_proj``."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        return value
    return tuple(name for item in items for name in _BETWEEN_NAMES.split(item) if name)


AnyNames = Annotated[tuple[str, ...], BeforeValidator(_as_names, json_schema_input_type=str | tuple[str, ...])]
Names = Annotated[AnyNames, Field(min_length=1)]


class TunerBase(Section):
    name: Names = Field(("full",), description="what learns: files of swift_dist/tuners, applied in this order")
    trainable: AnyNames = Field(
        (), description="patterns of further weights that learn and are saved whole, such as embed_tokens or lm_head"
    )


class ObjectiveBase(Section):
    name: str | None = Field(
        None, description="what is minimised: a file of swift_dist/objectives (default: sft causal_lm, rlhf dpo)"
    )
    reference: str | None = Field(
        None, description="the reference model's folder or id (default: the model before it learns)"
    )
    precompute_reference: bool = Field(
        False,
        description="compute the reference model's log-probabilities once, before the first step, and hold no second "
        "model while one learns",
    )

    def resolved_name(self, task: str) -> str:
        return self.name or ("dpo" if task == "rlhf" else "causal_lm")
