"""The hf engine's process: ``python -m swift_dist.serving.hf.server --served JSON --host HOST --port PORT``.

It listens once the model is loaded. On SIGTERM it takes no new connections, lets the answers that run end, and breaks
those off that take longer than ``--grace`` seconds: their streams end with an error event. Where the generator's thread
ends with an error, its answers end with it and then the process does: whoever started it sees that without asking.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
from typing import Any

from swift_dist.errors import EXIT_FAILED, EXIT_JOB_WRONG, JobError, RunError
from swift_dist.serving.hf.arguments import parser
from swift_dist.serving.options import EngineOptions, ServedModel

log = logging.getLogger(__name__)
_AFTERWARDS = 5  # seconds for what was broken off to say so


def main(words: list[str] | None = None) -> int:
    """Serve until a signal comes or the generator fails; the exit code."""
    try:
        given = parser().parse_args(words)
    except ValueError as error:
        print(f"{error}\n{parser().format_usage()}", file=sys.stderr)
        return EXIT_JOB_WRONG
    level = given.log_level.upper()
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel("WARNING")
    try:
        serving = load(read_served(given.served))
    except (JobError, RunError) as error:
        print(error, file=sys.stderr)
        return EXIT_JOB_WRONG if isinstance(error, JobError) else EXIT_FAILED
    try:
        _serve(serving, given.host, given.port, given.grace)
    finally:
        serving.generator.close()
    return 0 if serving.generator.error is None else EXIT_FAILED


def read_served(text: str) -> ServedModel:
    """The served model of the command line."""
    given: dict[str, Any] = json.loads(text)
    return ServedModel(**{**given, "options": EngineOptions.model_validate(given["options"])})


def load(served: ServedModel) -> Any:
    """The model, ready to answer (`generation.Serving`).

    Raises:
        JobError, RunError: it cannot be served.
    """
    from swift_dist.plugins import find
    from swift_dist.serving.families import ROOM, check_parsers, reasoning_tags_of, tool_parser_of
    from swift_dist.serving.hf.asked import Defaults
    from swift_dist.serving.hf.generation import Serving
    from swift_dist.serving.hf.metrics import Metrics
    from swift_dist.serving.hf.prompts import ChatPrompts

    options = served.options
    check_parsers(options)
    generator = _generator(served)
    tokenizer = generator.tokenizer
    tokenizer("a", verbose=False)  # what it changes of itself at its first call is not to happen in two threads at once
    prompts = ChatPrompts(tokenizer, options, served.name)
    parser_name = tool_parser_of(options, prompts.template)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return Serving(
        served=served,
        generator=generator,
        prompts=prompts,
        defaults=Defaults.of(served.path),
        metrics=Metrics(lambda: generator.running, lambda: generator.waiting),
        tools=find(ROOM, parser_name, "PARSER") if parser_name else None,
        reasoning=reasoning_tags_of(options, prompts.template),
        special_tokens=frozenset(special),
    )


def _generator(served: ServedModel) -> Any:
    from swift_dist.serving.hf.generator import started

    return started(served)


def _serve(serving: Any, host: str, port: int, grace: float) -> None:
    import uvicorn

    from swift_dist.serving.hf.app import create_app

    class Server(uvicorn.Server):
        async def on_tick(self, counter: int) -> bool:
            return await super().on_tick(counter) or serving.generator.error is not None

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            loop = asyncio.get_running_loop()
            # in a thread: it waits for the step that runs
            late = loop.call_later(grace, lambda: loop.run_in_executor(None, serving.generator.close))
            await super().shutdown(sockets)
            late.cancel()

    config = uvicorn.Config(
        create_app(serving),
        host=host,
        port=port,
        lifespan="off",
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=int(grace) + _AFTERWARDS,
    )
    log.info("%s listens on %s:%d", serving.served.name, host, port)
    Server(config).run()


if __name__ == "__main__":
    sys.exit(main())
