"""Options that the `convert` verbs share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from swift_dist.config import Section
from swift_dist.errors import JobError


class WorkOptions(Section):
    """Who does the work."""

    workers: int | None = Field(None, gt=0, description="processes (default: one for each CPU that may be used)")
    launcher: Literal["local", "ray"] = Field("local", description="processes of this machine, or a Ray cluster")
    ray_address: str | None = Field(
        None, description="running cluster of --launcher ray (default: RAY_ADDRESS, or this machine's)"
    )
    hf_config: str | None = Field(
        None, description="config.json of the model, or its folder (default: what the source says)"
    )


class LogitsOptions(Section):
    """Whether transformers' and Megatron's logits are compared."""

    logits: Literal["auto", "always", "never"] = Field(
        "auto", description="compare logits of transformers and Megatron: auto: where the model fits in memory"
    )
    logits_tolerance: float = Field(
        1e-4, gt=0, description="largest difference of logits, relative to the largest logit, in fp32"
    )


class ConvertOptions(WorkOptions, LogitsOptions):
    source: str = Field(description="what to convert")
    target: str = Field(description="folder to write; must not exist")
    dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="of the written weights (default: as stored)"
    )
    max_shard_size: str = Field("5GB", description="largest weight file, e.g. 5GB or 512MiB")
    dry_run: bool = Field(False, description="print what would be read and written; write nothing")
    verify: bool = Field(False, description="compare every value with the source before the target appears")
    strict: bool = Field(False, description="NaN or infinity among the weights is an error, not a warning")
    storage_rate: str = Field("1GB", description="bytes a second that the storage takes, for the estimate of a dry run")


def refuse_unread(options: WorkOptions) -> None:
    """Refuse options that were given and that nothing would read.

    Raises:
        JobError: the key is the first of them.
    """
    if options.ray_address is not None and options.launcher != "ray":
        raise JobError(
            "ray_address", f"is not read with launcher {options.launcher}", "add --launcher ray, or leave it out"
        )
    given = sorted(options.model_fields_set & LogitsOptions.model_fields.keys())
    if isinstance(options, ConvertOptions) and given and options.logits != "never" and not options.verify:
        raise JobError(given[0], "logits are compared with --verify only", "add --verify")
