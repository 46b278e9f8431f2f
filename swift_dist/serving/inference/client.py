"""Asking an OpenAI server: the official client as this package uses it, and its failures as ours."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from swift_dist.errors import RunError
from swift_dist.serving.inference.sampling import EXTENSIONS

if TYPE_CHECKING:
    from openai import APIError, AsyncOpenAI, OpenAI

_TIMEOUT = (10.0, None, None, None)  # to connect, to read, to write, for a connection: an answer may take long
KEY_VARIABLE = "OPENAI_API_KEY"


def open_client(url: str, *, is_ours: bool) -> OpenAI:
    """A client of the server at `url`; its key is the variable OPENAI_API_KEY, else one that means nothing.

    Args:
        url: with or without the ``/v1`` at its end.
        is_ours: whether this package started it. A proxy in the environment is for servers that the user names.
    """
    from openai import DefaultHttpxClient, OpenAI

    _quiet()
    http = DefaultHttpxClient(timeout=_TIMEOUT, trust_env=not (is_ours or _is_loopback(url)))
    return OpenAI(base_url=base_url(url), api_key=_key(), max_retries=0, http_client=http)


def open_async_client(url: str, *, is_ours: bool) -> AsyncOpenAI:
    """As `open_client`, for requests at the same time (up to 1000; more wait for a connection)."""
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    _quiet()
    http = DefaultAsyncHttpxClient(timeout=_TIMEOUT, trust_env=not (is_ours or _is_loopback(url)))
    return AsyncOpenAI(base_url=base_url(url), api_key=_key(), max_retries=0, http_client=http)


def _quiet() -> None:
    """The client's HTTP library logs a line for each request at INFO, the level of this package's own messages."""
    for name in ("httpx", "httpx2"):
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.WARNING)


def base_url(url: str) -> str:
    """What the openai client wants: ends with ``/v1``."""
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def _is_loopback(url: str) -> bool:
    """A proxy in the environment is not for servers of this machine."""
    from urllib.parse import urlsplit

    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


def _key() -> str:
    return os.environ.get(KEY_VARIABLE) or "none"


def served_models(url: str) -> list[str]:
    """Names that the server at `url` answers to.

    Raises:
        RunError: it does not say.
    """
    import openai

    with open_client(url, is_ours=False) as client:
        try:
            return [model.id for model in client.models.list()]
        except openai.APIError as error:
            raise as_run_error(error, url) from None


def arguments(model: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A request's fields as the client's methods take them: what OpenAI does not know goes into ``extra_body``."""
    known = {name: value for name, value in fields.items() if name not in EXTENSIONS}
    extra = {name: value for name, value in fields.items() if name in EXTENSIONS}
    return {"model": model, **known, **({"extra_body": extra} if extra else {})}


def reason_of(error: APIError) -> str:
    """What a server said, without the client's wrapping: one line for people."""
    body = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, Mapping) else None
    if said is None and isinstance(body, Mapping) and isinstance(body.get("error"), Mapping):
        said = body["error"].get("message")
    status = getattr(error, "status_code", None)
    text = str(said or error.__cause__ or error.message or type(error).__name__)
    return f"{text} (HTTP {status})" if status else text


def as_run_error(error: APIError, url: str) -> RunError:
    """A failure that ends what the user asked for.

    A server that cannot be reached, or a wrong key, is told with what to do about it.
    """
    import openai

    if isinstance(error, openai.APIConnectionError):
        return RunError(
            f"{url} does not answer: {reason_of(error)}", "look whether the server runs, and at its address"
        )
    if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
        return RunError(f"{url}: {reason_of(error)}", f"set {KEY_VARIABLE} to a key of that server")
    return RunError(f"{url}: {reason_of(error)}", "")


def as_json(value: Any) -> Any:
    """An answer's part (logprobs, usage, tool calls) as plain JSON values without what is null."""
    return json.loads(value.model_dump_json(exclude_none=True)) if hasattr(value, "model_dump_json") else value
