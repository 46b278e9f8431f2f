"""Keys of the front: where it listens, who may call, how much it takes and how long it waits."""

from __future__ import annotations

from pydantic import Field

from swift_dist.config.section import Section


class FrontOptions(Section):
    """Where clients reach the models, and what is asked of them. Times are seconds."""

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every one of this machine")
    port: int = Field(8000, ge=1, le=65535, description="port of the OpenAI API")
    api_keys: str | None = Field(None, description="file with an API key a line (default: none is asked for)")
    api_keys_variable: str | None = Field(
        None, description="environment variable that holds API keys, separated by spaces or commas"
    )
    admin_keys: str | None = Field(
        None, description="file with a key a line that may load and unload adapters through this address"
    )
    max_request_bytes: int = Field(
        1 << 20,
        ge=1024,
        le=64 << 20,
        description="largest body of a request; a larger one gets 413. As much memory is taken by each request that "
        "waits for its first byte, as the copy that retries are made from",
    )
    max_concurrent: int = Field(256, gt=0, description="requests that one replica is given at a time; others wait")
    max_waiting: int = Field(256, gt=0, description="requests that wait, a replica; beyond that they get 429")
    retries: int = Field(
        3,
        ge=0,
        le=10,
        description="times a request is sent again, to another replica where there is one, when one failed before its "
        "first byte; connections that a killed replica refuses, until it counts as down, are among them",
    )
    retry_after: int = Field(2, gt=0, description="seconds that Retry-After asks for with 429 and 503")
    timeout_queue: int = Field(60, gt=0, description="how long a request may wait for a place at a replica")
    timeout_answer: int = Field(3600, gt=0, description="how long an answer that is not streamed may take")
    timeout_stream: int = Field(600, gt=0, description="longest silence of a streamed answer, its first byte included")
    timeout_client: int = Field(60, gt=0, description="longest silence of a client that sends or should read")
    drain: int = Field(60, ge=0, description="how long running requests may go on once the front is told to stop")


def url_of(options: FrontOptions) -> str:
    """Where clients on this machine find a front."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{options.port}"
