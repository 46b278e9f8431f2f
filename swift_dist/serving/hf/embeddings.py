"""``POST /v1/embeddings``"""

from __future__ import annotations

import asyncio
import base64
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from swift_dist.serving.hf.completions import ids_of
from swift_dist.serving.hf.failures import bad_request, too_long
from swift_dist.serving.hf.generation import Serving, unless_gone
from swift_dist.serving.hf.protocol import EmbeddingRequest
from swift_dist.serving.hf.requests import GeneratorFailed


async def embed(serving: Serving, request: Request, body: EmbeddingRequest) -> Response:
    """Vectors of texts."""
    if serving.served.options.task != "embed":
        raise bad_request(
            f"The model {serving.served.name!r} is served for text: --task embed serves embeddings", "model"
        )
    if serving.adapter(body.model) is not None:
        raise bad_request("embeddings are the model's own: adapters are for text", "model")
    prompts = await asyncio.to_thread(ids_of, serving, body.input)
    limit = serving.generator.model_max_length
    for ids in prompts:
        if len(ids) > limit:
            raise too_long(len(ids), None, limit, "input")
    if body.dimensions is not None:
        _check_dimensions(serving, body.dimensions)
    try:
        vectors = await unless_gone(request, serving.generator.embed(prompts))
    except ValueError as error:
        raise bad_request(str(error), "input") from None
    except GeneratorFailed as error:
        raise serving.dead(error) from None
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector, body)}
        for index, vector in enumerate(vectors)
    ]
    total = sum(len(ids) for ids in prompts)
    serving.metrics.prompt_tokens.inc(total)
    usage = {"prompt_tokens": total, "total_tokens": total}
    return JSONResponse({"object": "list", "data": data, "model": body.model or serving.served.name, "usage": usage})


def _check_dimensions(serving: Serving, dimensions: int) -> None:
    """Shorter vectors are for models that were trained for them, whose configuration says so (as for vLLM)."""
    file = Path(serving.served.path) / "config.json"
    config: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    known = config.get("matryoshka_dimensions")
    if not (config.get("is_matryoshka") or known):
        raise bad_request(f"The model {serving.served.name!r} has vectors of one size only", "dimensions")
    if known and dimensions not in known:
        raise bad_request(f"The model {serving.served.name!r} has vectors of {known} numbers", "dimensions")


def _written(vector: list[float], body: EmbeddingRequest) -> list[float] | str:
    if body.dimensions is not None:
        if body.dimensions > len(vector):
            raise bad_request(f"the model's vectors have {len(vector)} numbers", "dimensions")
        vector = vector[: body.dimensions]
        norm = math.sqrt(sum(value * value for value in vector)) or 1.0
        vector = [value / norm for value in vector]
    if body.encoding_format == "base64":
        return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
    return vector
