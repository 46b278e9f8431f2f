"""Errors as OpenAI's API writes them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: for people.
        param: the request's field that is wrong.
        code: for programs, such as ``model_not_found``.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The response."""
        kinds = {404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> RequestError:
    return RequestError(400, message, param, code)


def model_not_found(name: str, known: tuple[str, ...]) -> RequestError:
    message = f"The model {name!r} does not exist. There are: {', '.join(known)}"
    return RequestError(404, message, "model", "model_not_found")


def too_long(prompt: int, answer: int | None, limit: int, param: str) -> RequestError:
    """A prompt, or a prompt and the answer asked for, that the context has no room for."""
    asked = f"{prompt} in the prompt" + (f" and {answer} for the answer" if answer is not None else "")
    message = f"This model's maximum context length is {limit} tokens. However, you requested {asked}."
    return bad_request(message, param, "context_length_exceeded")


def from_validation(errors: Any) -> RequestError:
    """What pydantic found wrong, as one message."""
    first = errors[0]
    place = [str(step) for step in first.get("loc", ()) if step != "body"]
    # pydantic names the branches of a union, which is no part of the request
    place = [step for step in place if step.isidentifier() or step.isdecimal()]
    param = ".".join(place) or None
    text = first.get("msg", "invalid").removeprefix("Value error, ")
    if first.get("type") == "extra_forbidden":
        text = "this field is not known to the hf engine"
    return bad_request(f"{param}: {text}" if param else text, param)
