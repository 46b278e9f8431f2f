"""What an engine is asked to serve: the keys that `swift-dist infer` and `swift-dist deploy` have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from swift_dist.config.section import Section


class EngineOptions(Section):
    """Keys of an engine; the same flags whichever engine runs. Each engine refuses what it cannot honour."""

    infer_backend: str = Field(
        "auto", description="vllm, lmdeploy or hf (default: auto, the first of vllm and hf that can run here)"
    )
    task: Literal["auto", "generate", "embed"] = Field(
        "auto", description="what the model is for: generate (text), embed (embeddings; auto: if the model says so)"
    )
    accelerator: Literal["auto", "gpu", "cpu"] = Field(
        "auto", description="what engines compute on (auto: GPUs where there are some)"
    )
    tensor_parallel_size: int = Field(1, ge=1, description="devices that share each matrix")
    pipeline_parallel_size: int = Field(1, ge=1, description="devices that share the layers")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="weights and activations (auto: as saved)"
    )
    max_model_len: int | None = Field(None, gt=0, description="tokens of prompt and answer (default: the model's own)")
    max_num_seqs: int = Field(256, gt=0, description="sequences that are generated at the same time; others wait")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="share of a GPU's memory that an engine takes")
    cpu_cache_gib: float = Field(1.0, gt=0, description="GiB of a CPU's memory for keys and values")
    max_loras: int = Field(4, ge=0, description="adapters in one batch; 0: no adapters can be loaded")
    max_lora_rank: int = Field(64, gt=0, description="largest rank of an adapter")
    chat_template: str | None = Field(None, description="file of a Jinja chat template (default: the tokenizer's)")
    tool_call_parser: str | None = Field(None, description="how tool calls are read from text (default: by the family)")
    reasoning_parser: str | None = Field(
        None, description="how reasoning is told from the answer (default: by the family)"
    )
    agent_format: str | None = Field(
        None, description="react, toolbench, hermes or qwen: tools in the prompt, for models whose template has none"
    )
    trust_remote_code: bool = Field(False, description="run Python files that lie in the model's folder")
    seed: int | None = Field(
        None,
        description="of sampling, where a request names none: replicas with the same one draw alike (default: each "
        "process of the hf engine begins elsewhere; vllm: 0)",
    )
    engine_args: tuple[str, ...] = Field((), description="words handed to the engine's own command as they are")


@dataclass(frozen=True)
class ServedModel:
    """One model as an engine serves it.

    Attributes:
        name: what requests call it (``model``).
        path: Hugging Face folder; whatever the user gave has been converted to one.
        options: the engine's keys.
        adapters: name -> PEFT folder, loaded at the start.
        use_gpu: whether it computes on GPUs.
    """

    name: str
    path: str
    options: EngineOptions
    adapters: dict[str, str] = field(default_factory=dict)
    use_gpu: bool = False
