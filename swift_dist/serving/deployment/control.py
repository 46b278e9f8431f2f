"""The control API of a deployment, on 127.0.0.1 in the controller's process: models, adapters, updates, numbers.

The front hands over whatever is not generated. ``/control/*`` and the loading of adapters need the admin token of the
deployment's folder.
"""

# Annotations are evaluated: FastAPI reads them, and some name classes that are imported inside functions.
import asyncio
import hmac
import socket
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from swift_dist.serving.deployment.desired import Refused
from swift_dist.serving.deployment.status import deployment_status, ready_replicas
from swift_dist.serving.front.keys import keys_of_file

if TYPE_CHECKING:
    from swift_dist.serving.deployment.controller import Controller

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}


class LoadAdapter(BaseModel):
    """Body of /v1/load_lora_adapter, as vLLM's; `model` where the deployment has several."""

    lora_name: str
    lora_path: str
    model: str | None = None


class UnloadAdapter(BaseModel):
    """Body of /v1/unload_lora_adapter."""

    lora_name: str


class Update(BaseModel):
    """Body of /control/update: the new version is the Hugging Face folder `path`, which was made of `source`."""

    source: str
    path: str
    share: float = Field(1.0, gt=0, le=1)
    surge: int | None = Field(None, ge=0)
    model: str | None = None


class Which(BaseModel):
    """Body of /control/promote and /control/rollback."""

    surge: int | None = Field(None, ge=0)
    model: str | None = None


async def serve_control(controller: "Controller", port: int | None) -> int:
    """Begin to answer; returns the port: `port` where that is free, else another."""
    import uvicorn

    listener = _listen(port)
    config = uvicorn.Config(control_app(controller), log_level="warning", access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]  # the actor's are Ray's
    controller.control_task = asyncio.create_task(server.serve(sockets=[listener]))
    return listener.getsockname()[1]


def _listen(port: int | None) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port or 0))
    except OSError:
        listener.bind(("127.0.0.1", 0))
    return listener


def control_app(controller: "Controller") -> Any:
    """The API as FastAPI has it."""
    from fastapi import Depends, FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse
    from starlette.exceptions import HTTPException

    app = FastAPI(title="swift_dist control", docs_url=None, redoc_url=None)
    token = controller.folder.token()
    admin_keys = controller.spec.admin_keys
    adapter_keys = [token, *(keys_of_file("admin_keys", admin_keys) if admin_keys else ())]

    def require(request: Request, keys: list[str]) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        matches = [hmac.compare_digest(given, key.encode()) for key in keys]  # with all of them
        if not any(matches):
            raise HTTPException(401, "this needs the deployment's admin token")

    async def admin(request: Request) -> None:
        require(request, [token])

    async def adapter_admin(request: Request) -> bool:
        """Whether it is who owns the deployment, and may name any folder that they can name to `--adapters`."""
        require(request, adapter_keys)
        return request.headers["authorization"] == f"Bearer {token}"

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": _cards(controller)}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        card = next((c for c in _cards(controller) if c["id"] == name), None)
        if card is None:
            raise HTTPException(404, f"The model `{name}` does not exist.")
        return card

    @app.get("/health")
    async def health() -> JSONResponse:
        ready = ready_replicas(controller)
        without = [name for name, count in ready.items() if not count]
        return JSONResponse({"status": "unavailable" if without else "ok", "replicas": ready}, 503 if without else 200)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        from swift_dist.serving.deployment.metrics import deployment_metrics

        return PlainTextResponse(await deployment_metrics(controller), media_type="text/plain; version=0.0.4")

    _add_adapters(app, controller, Depends(adapter_admin))
    _add_changes(app, controller, [Depends(admin)])
    _add_errors(app)
    return app


def _add_errors(app: Any) -> None:
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return _error(getattr(error, "status", 409), str(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return _error(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")


def _add_adapters(app: Any, controller: "Controller", admin: Any) -> None:
    @app.post("/v1/load_lora_adapter")
    async def load(body: LoadAdapter, is_owner: bool = admin) -> dict[str, Any]:
        roots = ("/",) if is_owner else controller.spec.adapter_roots
        await controller.adapters.load(body.lora_name, body.lora_path, body.model, roots)
        return {"status": "loaded", "lora_name": body.lora_name}

    @app.post("/v1/unload_lora_adapter", dependencies=[admin])
    async def unload(body: UnloadAdapter) -> dict[str, Any]:
        await controller.adapters.unload(body.lora_name)
        return {"status": "unloaded", "lora_name": body.lora_name}


def _add_changes(app: Any, controller: "Controller", only_admin: list[Any]) -> None:
    @app.get("/control/status", dependencies=only_admin)
    async def status() -> dict[str, Any]:
        return deployment_status(controller)

    @app.post("/control/update", dependencies=only_admin)
    async def update(body: Update) -> dict[str, Any]:
        return (await controller.update(**body.model_dump(exclude={"model"}), name=body.model)).model_dump()

    @app.post("/control/promote", dependencies=only_admin)
    async def promote(body: Which) -> dict[str, Any]:
        return (await controller.promote(body.model, body.surge)).model_dump()

    @app.post("/control/rollback", dependencies=only_admin)
    async def rollback(body: Which) -> dict[str, Any]:
        return (await controller.rollback(body.model, body.surge)).model_dump()

    @app.post("/control/stop", dependencies=only_admin)
    async def stop() -> dict[str, Any]:
        await controller.stop()
        return {"status": "stopping"}


def _error(status: int, message: str) -> Any:
    from fastapi.responses import JSONResponse

    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    code = "invalid_api_key" if status == 401 else None
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status)


def _cards(controller: "Controller") -> list[dict[str, Any]]:
    """Models and adapters as OpenAI lists them, with vLLM's `root` and `parent`, and `task`: what each is for."""
    cards = []
    for model in controller.models.values():
        version = model.live or model.candidate
        own = _card(model.name, controller.began_at, version.path if version else None, None)
        adapters = [_card(name, controller.began_at, path, model.name) for name, path in model.adapters.items()]
        cards += [{**card, "task": model.task} for card in (own, *adapters)]
    return cards


def _card(name: str, created: int, root: str | None, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "swift_dist",
        "root": root,
        "parent": parent,
    }
