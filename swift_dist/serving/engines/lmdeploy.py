"""LMDeploy: `lmdeploy serve api_server` with its PyTorch engine, in an environment of its own made on first use.

Its torch is older than ours, so nothing of it is imported here. It computes on CUDA devices only. What has been tried
against the real package 0.18.0 are its command line and its routes; generating with it has not been run, because no
GPU was at hand.
"""

from __future__ import annotations

import sys
from typing import Any

from swift_dist.errors import JobError
from swift_dist.serving.engines._adapters import check_lora
from swift_dist.serving.engines._environment import OwnEnvironment
from swift_dist.serving.engines._model import read_config, saved_dtype
from swift_dist.serving.engines._parsers import reasoning_parser, tool_parser
from swift_dist.serving.engines.base import Engine, refuse_changed
from swift_dist.serving.families import template_of
from swift_dist.serving.options import EngineOptions, ServedModel

VERSION = "0.18.0"
_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16"}
# vLLM's names, which are our options' -> LMDeploy's (lmdeploy/serve/parsers)
_TOOL_PARSERS = {
    "hermes": "qwen3",
    "qwen3_coder": "qwen3coder",
    "qwen3_xml": "qwen3coder",
    "glm45": "glm47",
    "glm47": "glm47",
    "llama3_json": "llama3",
    "internlm": "internlm",
    "kimi_k2": "kimi_k2",
    "deepseek_v32": "deepseek-v32",
}
_REASONING_PARSERS = {"qwen3": "default", "deepseek_r1": "default", "glm45": "default", "deepseek_v3": "deepseek-v3"}


class LmDeploy(Engine):
    """`lmdeploy serve api_server`."""

    name = "lmdeploy"
    running_metric = "lmdeploy:num_requests_running"
    waiting_metric = "lmdeploy:num_requests_waiting"
    gauge_seconds = 10.0  # its server brings both up to date that often

    def __init__(self) -> None:
        self.own = OwnEnvironment("lmdeploy", VERSION)

    def why_not(self) -> str | None:
        return None if sys.platform == "linux" else "LMDeploy is built for Linux"

    def why_not_on(self, use_gpu: bool) -> str | None:
        return None if use_gpu else "LMDeploy needs a CUDA device, and there is none"

    def prepare(self) -> None:
        self.own.make()

    def check(self, served: ServedModel) -> None:
        options = served.options
        if why_not := self.why_not_on(served.use_gpu):
            raise JobError("infer_backend", why_not, "Use --infer_backend hf.")
        if options.task == "embed":
            raise JobError("task", "LMDeploy gives no embeddings", "Use --infer_backend vllm or hf.")
        _refuse(options)
        self._check_dtype(served)
        for key, name, known in (
            ("tool_call_parser", options.tool_call_parser, _TOOL_PARSERS),
            ("reasoning_parser", options.reasoning_parser, _REASONING_PARSERS),
        ):
            if name is not None and name not in known:
                raise JobError(key, f"LMDeploy has no counterpart of {name}", f"Use one of: {', '.join(known)}.")
        for name, path in served.adapters.items():
            check_lora("LMDeploy", name, path, options.max_lora_rank)

    def _check_dtype(self, served: ServedModel) -> None:
        options = served.options
        if options.dtype == "fp32":
            raise JobError("dtype", "LMDeploy computes in 16 bits only", "Use --dtype bf16, or --infer_backend vllm.")
        if options.dtype == "auto" and saved_dtype(served.path, read_config(served.path)) == "float32":
            raise JobError(
                "dtype",
                "the weights are saved in fp32, and LMDeploy computes in 16 bits only",
                "Add --dtype bf16 or fp16.",
            )

    def command(self, served: ServedModel, host: str, port: int) -> list[str]:
        options = served.options
        words = [str(self.own.program("lmdeploy")), "serve", "api_server", served.path]
        words += ["--server-name", host, "--server-port", str(port), "--model-name", served.name]
        # The other engine, TurboMind, takes no adapters, and which models it takes is found only as it starts.
        words += ["--backend", "pytorch", "--device", "cuda", "--dtype", _DTYPES[options.dtype]]
        words += ["--tp", str(options.tensor_parallel_size), "--max-batch-size", str(options.max_num_seqs)]
        if options.max_model_len is not None:
            words += ["--session-len", str(options.max_model_len)]
        if options.trust_remote_code:
            words += ["--trust-remote-code"]
        words += _parsers(served)
        if served.adapters:
            words += ["--adapters", *(f"{name}={path}" for name, path in served.adapters.items())]
        return [*words, *options.engine_args]

    def environment(self, served: ServedModel) -> dict[str, str]:
        return {"PYTHONPATH": "", "PYTHONNOUSERSITE": "1"}  # nothing of our environment, nor of the user's own

    def adapter_request(self, name: str, path: str | None) -> tuple[str, dict[str, Any]]:
        """LMDeploy loads adapters at its start only.

        Raises:
            JobError: always.
        """
        raise JobError(
            "adapters",
            f"LMDeploy loads and unloads adapters only at its start, not {name} at run time",
            "Name it with --adapters, or use --infer_backend vllm or hf.",
        )


def _parsers(served: ServedModel) -> list[str]:
    options, words = served.options, []
    template = template_of(served.path, options)
    model_type = str(read_config(served.path).get("model_type", ""))
    tools = _TOOL_PARSERS.get(tool_parser(options, template) or "")
    if tools is not None:
        words += ["--tool-call-parser", tools]
    reasoning = _REASONING_PARSERS.get(reasoning_parser(options, template, model_type) or "")
    if reasoning is not None:
        words += ["--reasoning-parser", reasoning]
    return words


def _refuse(options: EngineOptions) -> None:
    """Raises JobError for what was asked for and has no counterpart."""
    no_counterpart = {
        "cpu_cache_gib": ("LMDeploy computes on GPUs", "Leave it out."),
        "max_loras": ("LMDeploy does not bound the adapters of a batch", "Leave it out."),
        "seed": ("LMDeploy's server has no seed of its own", "Name a seed in each request."),
        "gpu_memory_utilization": (
            "LMDeploy takes a share of what the weights leave free, not of the GPU",
            "Name LMDeploy's own --cache-max-entry-count in --engine_args.",
        ),
        "chat_template": (
            "LMDeploy reads the template of the model's folder",
            "Put it there as chat_template.jinja, or use --infer_backend vllm.",
        ),
        "agent_format": ("LMDeploy takes no chat template", "Use --infer_backend vllm or hf."),
        "pipeline_parallel_size": ("LMDeploy has no pipeline parallelism", "Use --infer_backend vllm."),
    }
    refuse_changed(options, no_counterpart)


ENGINE = LmDeploy()
