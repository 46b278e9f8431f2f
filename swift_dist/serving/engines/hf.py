"""The engine that runs wherever transformers does: our server over transformers' models (`swift_dist.serving.hf`)."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from swift_dist.errors import JobError
from swift_dist.serving.engines.base import Engine
from swift_dist.serving.families import check_parsers, template_of
from swift_dist.serving.hf.arguments import parser
from swift_dist.serving.options import ServedModel


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
        if options.agent_format and not template_of(served.path, options):
            raise JobError(
                "agent_format", f"{served.path} has no chat template to write the tools into", "give --chat_template"
            )
        if served.adapters and options.task == "embed":
            raise JobError("adapters", "embeddings are the model's own", "merge the adapter, or leave it out")
        try:
            parser().parse_args(["--served", "{}", "--host", "h", "--port", "1", *options.engine_args])
        except ValueError as error:
            raise JobError("engine_args", str(error), parser().format_usage().strip()) from None

    def command(self, served: ServedModel, host: str, port: int) -> list[str]:
        given = {**asdict(served), "options": served.options.model_dump()}
        module = "swift_dist.serving.hf.server"
        words = ["--served", json.dumps(given), "--host", host, "--port", str(port)]
        return [sys.executable, "-P", "-m", module, *words, *served.options.engine_args]


ENGINE = HfEngine()
