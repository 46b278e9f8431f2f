"""The hf engine's OpenAI API as a FastAPI application."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swift_dist.serving.hf.chat import chat
from swift_dist.serving.hf.completions import complete
from swift_dist.serving.hf.embeddings import embed
from swift_dist.serving.hf.failures import RequestError, bad_request, from_validation
from swift_dist.serving.hf.generation import ClientGone, Serving
from swift_dist.serving.hf.protocol import (
    ChatRequest,
    CompletionRequest,
    Detokenize,
    EmbeddingRequest,
    LoadAdapter,
    Tokenize,
    UnloadAdapter,
)
from swift_dist.serving.hf.requests import GeneratorFailed

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_GONE = 499  # nginx' status of a client that has left: nobody reads it
_STREAMED = {"description": "in one piece, or a stream of events", "content": {"text/event-stream": {}}}
_STATUSES: dict[int | str, dict[str, Any]] = {
    400: {"description": "the request is wrong"},
    404: {"description": "no such model"},
    503: {"description": "the engine has failed"},
}


class _StrictRequest(Request):
    """JSON without what cannot be text: lone halves of surrogate pairs, NaN."""

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise bad_request(f"the body is not JSON: {error}") from None


class _StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(_StrictRequest(request.scope, request.receive))

        return strict


def create_app(serving: Serving) -> FastAPI:
    """The application of one served model."""
    app = FastAPI(title="swift_dist hf engine", version="1", docs_url=None, redoc_url=None)
    app.router.route_class = _StrictRoute
    _add_generation(app, serving)
    folders = dict(serving.served.adapters)
    _add_adapters(app, serving, folders)
    _add_rest(app, serving, folders)
    _add_failures(app)
    app.add_middleware(_RequestIds)
    return app


def _add_generation(app: FastAPI, serving: Serving) -> None:
    @app.post("/v1/chat/completions", responses={**_STATUSES, 200: _STREAMED})
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await chat(serving, request, body, request.state.request_id)

    @app.post("/v1/completions", responses={**_STATUSES, 200: _STREAMED})
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await complete(serving, request, body, request.state.request_id)

    @app.post("/v1/embeddings", responses=_STATUSES)
    async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
        return await embed(serving, request, body)

    @app.post("/tokenize", responses=_STATUSES)
    async def tokenize(body: Tokenize) -> Response:
        serving.adapter(body.model)
        ids = await asyncio.to_thread(_tokens, serving, body)
        answer = {"count": len(ids), "max_model_len": serving.generator.model_max_length, "tokens": ids}
        if body.return_token_strs:
            answer["token_strs"] = serving.tokenizer.convert_ids_to_tokens(ids)
        return JSONResponse(answer)

    @app.post("/detokenize", responses=_STATUSES)
    async def detokenize(body: Detokenize) -> Response:
        serving.adapter(body.model)
        size = len(serving.tokenizer)
        if any(token >= size for token in body.tokens):
            raise bad_request(f"a token id is not in the vocabulary of {size}", "tokens")
        return JSONResponse({"prompt": serving.tokenizer.decode(body.tokens)})


def _tokens(serving: Serving, body: Tokenize) -> list[int]:
    if body.messages is not None:
        return serving.prompts.render(body, list(body.tools or ())).ids
    return serving.tokenizer(body.prompt, add_special_tokens=body.add_special_tokens, verbose=False)["input_ids"]


def _add_adapters(app: FastAPI, serving: Serving, folders: dict[str, str]) -> None:
    """Adapters that come and go; `folders` is kept as they do."""

    @app.post("/v1/load_lora_adapter", responses=_STATUSES, response_class=PlainTextResponse)
    async def load(body: LoadAdapter) -> Response:
        if body.lora_name in serving.names:
            raise bad_request(f"the name {body.lora_name!r} is taken", "lora_name")
        if not Path(body.lora_path).is_dir():
            raise RequestError(404, f"no folder {body.lora_path}", "lora_path", "adapter_not_found")
        try:
            await serving.generator.load_adapter(body.lora_name, body.lora_path)
        except ValueError as error:
            raise bad_request(str(error), "lora_path") from None
        folders[body.lora_name] = body.lora_path
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter", responses=_STATUSES, response_class=PlainTextResponse)
    async def unload(body: UnloadAdapter) -> Response:
        try:
            await serving.generator.unload_adapter(body.lora_name)
        except KeyError:
            message = f"The lora adapter '{body.lora_name}' cannot be found."
            raise RequestError(404, message, "lora_name", "adapter_not_found") from None
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _add_rest(app: FastAPI, serving: Serving, folders: dict[str, str]) -> None:
    begun = int(time.time())

    @app.get("/v1/models")
    async def models() -> Response:
        names = serving.names
        cards = [
            {
                "id": name,
                "object": "model",
                "created": begun,
                "owned_by": "swift_dist",
                "root": serving.served.path if name == names[0] else folders.get(name, name),
                "parent": None if name == names[0] else names[0],
                "max_model_len": serving.generator.model_max_length,
            }
            for name in names
        ]
        return JSONResponse({"object": "list", "data": cards})

    @app.get("/health", responses={503: _STATUSES[503]}, response_class=PlainTextResponse)
    async def health() -> Response:
        if serving.failed:
            raise RequestError(503, f"The engine has failed: {serving.failed}", code="engine_failed")
        return PlainTextResponse("")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(serving.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_failures(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def wrong(request: Request, error: RequestError) -> Response:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return JSONResponse(from_validation(error.errors()).body, 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        body = RequestError(error.status_code, str(error.detail)).body
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=_GONE)

    @app.exception_handler(GeneratorFailed)
    async def dead(request: Request, error: GeneratorFailed) -> Response:
        return JSONResponse(RequestError(503, f"The engine has failed: {error}", code="engine_failed").body, 503)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        # starlette logs the traceback
        return JSONResponse(RequestError(500, "The server failed; its log says how").body, 500)


class _RequestIds:
    """Each request has an id, its own or a new one, which goes back with the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        await self._app(scope, receive, with_id)
