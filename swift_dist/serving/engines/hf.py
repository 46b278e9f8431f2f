"""The engine that runs wherever transformers does: our server over transformers' models (`swift_dist.serving.hf`)."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from swift_dist.errors import JobError
from swift_dist.serving.engines._model import check_length, read_config
from swift_dist.serving.engines.base import Engine, refuse_changed
from swift_dist.serving.families import check_parsers, template_of
from swift_dist.serving.hf.arguments import parser
from swift_dist.serving.options import EngineOptions, ServedModel


class HfEngine(Engine):
    name = "hf"

    def why_not(self) -> str | None:
        """None: it runs wherever this package does."""
        return None

    def check(self, served: ServedModel) -> None:
        options = served.options
        for key in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(options, key) > 1:
                raise JobError(
                    key,
                    f"{getattr(options, key)}: the hf engine computes on one device",
                    "--infer_backend vllm, or 1",
                )
        check_parsers(options)
        check_length(read_config(served.path), options)
        if options.agent_format and not template_of(served.path, options):
            raise JobError(
                "agent_format", f"{served.path} has no chat template to write the tools into", "give --chat_template"
            )
        _check_adapters(served)
        refuse_changed(options, self.ignored(served))
        try:
            parser().parse_args(["--served", "{}", "--host", "h", "--port", "1", *options.engine_args])
        except ValueError as error:
            raise JobError("engine_args", str(error), parser().format_usage().strip()) from None

    def ignored(self, served: ServedModel) -> Mapping[str, tuple[str, str]]:
        if served.options.task == "embed":
            text = ("tool_call_parser", "reasoning_parser", "agent_format", "chat_template", "seed")
            room = ("max_num_seqs", "cpu_cache_gib", "gpu_memory_utilization", "max_loras", "max_lora_rank")
            why = dict.fromkeys(text, "a model that is served for embeddings writes no text")
            why |= dict.fromkeys(room, "the hf engine embeds without a cache of keys and values, and without adapters")
        elif served.use_gpu:
            why = {"cpu_cache_gib": "the hf engine computes on a GPU here, and keeps keys and values there"}
        else:
            why = {"gpu_memory_utilization": "the hf engine computes on a CPU here"}
        return {key: (said, f"leave out --{key}") for key, said in why.items()}

    def cache_gib(self, options: EngineOptions) -> float:
        return 0.0 if options.task == "embed" else options.cpu_cache_gib

    def command(self, served: ServedModel, host: str, port: int) -> list[str]:
        given = {**asdict(served), "options": served.options.model_dump()}
        module = "swift_dist.serving.hf.server"
        words = ["--served", json.dumps(given), "--host", host, "--port", str(port)]
        return [sys.executable, "-P", "-m", module, *words, *served.options.engine_args]


def _check_adapters(served: ServedModel) -> None:
    if not served.adapters:
        return
    if served.options.task == "embed":
        raise JobError("adapters", "embeddings are the model's own", "merge the adapter, or leave it out")
    if not served.options.max_loras:
        raise JobError("max_loras", "0, with which no adapter can be loaded", "give --max_loras 1, or more")
    for name, path in served.adapters.items():
        if name == served.name:
            raise JobError("adapters", f"{name!r} is the model's own name", "give the adapter another one")
        if not (Path(path) / "adapter_config.json").is_file():
            raise JobError("adapters", f"{name}: no adapter_config.json in {path}", "give a folder that PEFT saved")


ENGINE = HfEngine()
