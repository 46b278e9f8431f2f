"""QLoRA: LoRA beside a base whose matrices are quantised by bitsandbytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from swift_dist.errors import JobError
from swift_dist.tuners import lora
from swift_dist.tuners.base import Strategy

if TYPE_CHECKING:
    import torch

    from swift_dist.config import JobConfig


class Options(lora.Options):
    init: Literal["default", "gaussian"] = Field("default", description="first A; B is 0")
    bits: Literal[4, 8] = Field(4, description="of a frozen weight: 4, or 8 (LLM.int8, arXiv 2208.07339)")
    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4 bits: the 16 values that a weight can have")
    double_quant: bool = Field(True, description="4 bits: quantise the scales of blocks, too")
    compute_dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "bf16", description="4 bits: of products with frozen weights"
    )

    @model_validator(mode="after")
    def _of_4_bits(self) -> Options:
        for name in ("quant_type", "double_quant", "compute_dtype"):
            if self.bits == 8 and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is of 4 bits, and bits is 8: leave it out")
        return self


class QLora(lora.Lora):
    name = "qlora"
    summary = "LoRA beside a base quantised by bitsandbytes (QLoRA, arXiv 2305.14314)"

    def refuses(self, strategy: Strategy, options: Any) -> str | None:
        if options.bits == 8 and strategy == "fsdp2":
            return "bitsandbytes keeps the scales of 8-bit weights on the tensor itself, which FSDP2 replaces"
        return None

    def check(self, job: JobConfig, options: Options) -> None:
        if job.model.resolved_init != "pretrained":
            raise JobError(
                "model.init",
                "random weights are not quantised: bitsandbytes does it as weights are loaded",
                "give model.path, a folder of weights, or use lora",
            )

    def load_arguments(self, options: Options) -> dict[str, Any]:
        """``quantization_config`` for ``from_pretrained``."""
        import torch
        from transformers import BitsAndBytesConfig

        if options.bits == 8:
            return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.compute_dtype]
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=options.quant_type,
            bnb_4bit_use_double_quant=options.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
        return {"quantization_config": config}

    def apply(self, model: Any, options: Any, *, seed: int, trainable: Sequence[str] = ()) -> torch.nn.Module:
        if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
            raise JobError(
                "tuner.name",
                "qlora needs a base that bitsandbytes quantises as it is loaded, and this one is not quantised",
                "give model.path, a folder of weights, or use lora",
            )
        for module in model.modules():
            # Where a CPU has AVX512-BF16, bitsandbytes repacks weights in the first evaluation, for a product that has
            # no gradient: from then on, what lies below each matrix would learn nothing through it.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return super().apply(model, options, seed=seed, trainable=trainable)


TUNER = QLora()
