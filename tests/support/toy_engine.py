"""An engine that starts at once: a small OpenAI server in a process of its own, for tests of what is above engines.

The model's folder holds toy.json: {"says": text, "seconds": of an answer, "start_seconds": before it answers, "fails":
what it says instead of starting}.
Answers name the process and the folder that made them, so a test sees which version and replica it was.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from swift_dist.serving.engines.base import Engine
from swift_dist.serving.options import ServedModel


class ToyEngine(Engine):
    name = "toy_engine:ENGINE"
    start_seconds = 60.0

    def why_not(self) -> str | None:
        return None

    def check(self, served: ServedModel) -> None:
        pass

    def command(self, served: ServedModel, host: str, port: int) -> list[str]:
        adapters = json.dumps(served.adapters)
        return [sys.executable, __file__, served.name, served.path, host, str(port), adapters]


ENGINE = ToyEngine()


def save_toy_model(folder: Path, says: str, **more: Any) -> Path:
    """A folder that the toy engine serves; for whoever looks at it, it is a llama with next to no weights."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / "toy.json").write_text(json.dumps({"says": says, **more}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    save_file({"weight": np.zeros(1, np.float32)}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def save_toy_adapter(folder: Path) -> Path:
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8}))
    save_file({"weight": np.zeros(1, np.float32)}, folder / "adapter_model.safetensors")
    return folder


def main() -> None:
    from aiohttp import web

    name, path, host, port, adapters_json = sys.argv[1:]
    toy = json.loads((Path(path) / "toy.json").read_text())
    if "fails" in toy:
        sys.exit(toy["fails"])
    time.sleep(toy.get("start_seconds", 0))
    adapters: dict[str, str] = json.loads(adapters_json)
    running = 0

    async def chat(request: web.Request) -> web.StreamResponse:
        nonlocal running
        body = await request.json()
        if body["model"] not in (name, *adapters):
            return web.json_response({"error": {"message": f"no model {body['model']}"}}, status=404)
        running += 1
        try:
            await asyncio.sleep(float(toy.get("seconds", 0.0)))
            text = f"{toy['says']} {body['model']} {os.getpid()}"
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return web.json_response(
                {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
            )
        finally:
            running -= 1

    async def health(request: web.Request) -> web.Response:
        return web.Response()

    async def metrics(request: web.Request) -> web.Response:
        lines = [f"swift_dist:num_requests_running {running}", "swift_dist:num_requests_waiting 0", ""]
        return web.Response(text="\n".join(lines))

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": n, "root": root} for n, root in {name: path, **adapters}.items()]})

    async def load(request: web.Request) -> web.Response:
        body = await request.json()
        if (Path(body["lora_path"]) / "refuse").exists():
            refusals = Path(body["lora_path"]) / "refuse"
            if refusals.read_text().strip() in ("", str(port)):
                return web.json_response({"error": {"message": "rank too large"}}, status=400)
        adapters[body["lora_name"]] = body["lora_path"]
        return web.Response(text="loaded")

    async def unload(request: web.Request) -> web.Response:
        if adapters.pop((await request.json())["lora_name"], None) is None:
            return web.json_response({"error": {"message": "no such adapter"}}, status=404)
        return web.Response(text="unloaded")

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", chat), web.get("/health", health), web.get("/metrics", metrics)])
    app.add_routes([web.get("/v1/models", models)])
    app.add_routes([web.post("/v1/load_lora_adapter", load), web.post("/v1/unload_lora_adapter", unload)])
    web.run_app(app, host=host, port=int(port), print=None, shutdown_timeout=10)


if __name__ == "__main__":
    main()
