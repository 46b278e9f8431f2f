"""The hf engine's API fuzzed from its own OpenAPI description: whatever is asked, the server does not fail."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.openapi import from_asgi
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    status_code_conformance,
)

from swift_dist.serving.hf.app import create_app
from swift_dist.serving.hf.server import load
from swift_dist.serving.options import EngineOptions, ServedModel
from tests.support.chat_model import save_chat_model

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, negative_data_rejection]
FEW, MANY = 12, 1000
# Generation alone: examples that fail are not shrunk, which would take minutes and is only for reading them.
COMMON: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.generate],
}


@pytest.fixture(scope="module")
def api(tmp_path_factory) -> Iterator[Any]:
    # a short context: requests that are right end soon
    folder = save_chat_model(tmp_path_factory.mktemp("model"), max_position_embeddings=96)
    serving = load(ServedModel("tiny", str(folder), EngineOptions(dtype="fp32", agent_format="hermes")))
    yield from_asgi("/openapi.json", create_app(serving))
    serving.generator.close()


OPERATIONS = [
    *(("POST", f"/v1/{name}") for name in ("chat/completions", "completions", "embeddings")),
    *(("POST", f"/v1/{name}") for name in ("load_lora_adapter", "unload_lora_adapter")),
    *(("POST", path) for path in ("/tokenize", "/detokenize")),
    *(("GET", path) for path in ("/v1/models", "/health", "/metrics")),
]
CASES = [
    *((operation, GenerationMode.POSITIVE) for operation in OPERATIONS),
    *((operation, GenerationMode.NEGATIVE) for operation in OPERATIONS if operation[0] == "POST"),
]


def test_everything_is_described_and_asked(api):
    found = {(one.ok().method.upper(), one.ok().path) for one in api.get_all_operations()}
    assert found == set(OPERATIONS)


def fuzz(api: Any, operation: tuple[str, str], mode: GenerationMode, **how: Any) -> None:
    method, path = operation

    @settings(**COMMON, **how)
    @given(case=api[path][method].as_strategy(generation_mode=mode))
    def asked(case: Any) -> None:
        answer = case.call_and_validate(checks=CHECKS)
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"]

    asked()


@pytest.mark.parametrize(("operation", "mode"), CASES)
def test_no_request_breaks_the_server(api, operation, mode):
    fuzz(api, operation, mode, max_examples=FEW, derandomize=True)


@pytest.mark.table
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("operation", "mode"), CASES)
def test_no_request_breaks_the_server_many(api, operation, mode):
    fuzz(api, operation, mode, max_examples=MANY)
