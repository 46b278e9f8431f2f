"""An engine in a Python program: `swift_dist.Engine` starts one, asks it, and ends it. See also `swift_dist.infer`."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pydantic import Field

from swift_dist.config.load import build
from swift_dist.errors import JobError, RunError
from swift_dist.serving.options import EngineOptions
from swift_dist.serving.sources.source import SourceOptions, resolve_options

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    from swift_dist.serving.inference.replicas import LocalReplica

Messages = str | Sequence[Mapping[str, Any]]
"""A conversation as OpenAI's API has it, or the text of one message of the user."""


class _Options(SourceOptions, EngineOptions):
    """What `Engine` may be given."""

    replicas: int = Field(1, gt=0, description="processes that share what `batch` asks")


class Engine:
    """A model that answers, in a process of its own on this machine; or in several, which share a batch.

    >>> with swift_dist.Engine("runs/x", infer_backend="hf") as engine:  # doctest: +SKIP
    ...     print(engine.chat("Hello", max_tokens=20).choices[0].message.content)

    What `chat` and `complete` take beside the prompt are the fields of OpenAI's API (``temperature``, ``stop``,
    ``tools``, ...) and vLLM's (``top_k``, ``min_p``, ``repetition_penalty``), and what they give are the openai
    client's own objects. An engine that has ended is started again by the next call.

    Args:
        model: what ``--model`` of `swift-dist infer` takes.
        options: its keys that say which model and how it is served (``adapters=["a=DIR"]``, ``dtype="fp32"``, ...),
            and ``replicas``: how many such processes there are. All but `batch` ask the first.

    Attributes:
        model: the name that answers where a call names none: the adapter's, where an adapter was named.
        models: the names that it answers to.

    Raises:
        JobError: the model cannot be had, or not be served as asked; nothing was started.
    """

    def __init__(self, model: str, **options: Any) -> None:
        from swift_dist.serving.inference.replicas import engine_for

        self.options = build(_Options, [_listed({"model": model, **options})])
        self._source = resolve_options(
            self.options, trust_remote_code=self.options.trust_remote_code, task=self.options.task
        )
        self._engines = engine_for(self.options, self._source)
        self.models = [self._source.base_name, *self._source.adapters]
        self.model = self._source.name
        self._stack = ExitStack()
        self._replicas: list[LocalReplica] = []
        self._clients: dict[str, OpenAI] = {}

    def __enter__(self) -> Engine:
        """Start it, all its replicas at once, and wait until they answer. Raises RunError where one cannot be had."""
        from concurrent.futures import ThreadPoolExecutor

        from swift_dist.serving.inference.replicas import LogFolder, local_replicas
        from swift_dist.serving.sources.made import in_use

        with ExitStack() as stack:
            stack.enter_context(in_use(*self._source.folders))
            replicas = local_replicas(self._engines, self.options.replicas, stack.enter_context(LogFolder()))
            threads = stack.enter_context(ThreadPoolExecutor(len(replicas)))
            for replica in replicas:
                stack.callback(replica.stop)  # before the threads are waited for
            list(threads.map(lambda replica: replica.start(), replicas))
            self._replicas, self._stack = replicas, stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._replicas, self._clients = [], {}
        self._stack.__exit__(kind, error, at)

    @property
    def url(self) -> str:
        """Where it listens (the first replica); OpenAI's API is below ``/v1``.

        Raises:
            RunError: it is not started.
        """
        if not self._replicas:
            raise RunError("the engine is not started", "with swift_dist.Engine(...) as engine: ...")
        return self._replicas[0].process.url

    @property
    def client(self) -> OpenAI:
        """The official client of the server that runs now."""
        from swift_dist.serving.inference.client import open_client

        url = self.url
        if not self._replicas[0].alive():
            url = self._replicas[0].start()
        if url not in self._clients:
            self._clients[url] = self._stack.enter_context(open_client(url, is_ours=True))
        return self._clients[url]

    def chat(self, messages: Messages, *, model: str | None = None, **sampling: Any) -> ChatCompletion:
        """The answer to a conversation.

        Raises:
            openai.APIError: the engine refused it, or ended.
        """
        answer: ChatCompletion = self.client.chat.completions.create(**self._request(messages, model, sampling))
        return answer

    def stream(self, messages: Messages, *, model: str | None = None, **sampling: Any) -> Generator[str, None, None]:
        """The text of the answer, piece by piece as it is generated. Closing the generator ends the generation.

        Raises:
            openai.APIError: the engine refused it, or ended.
        """
        with self.client.chat.completions.create(stream=True, **self._request(messages, model, sampling)) as chunks:
            for chunk in chunks:
                for choice in chunk.choices:
                    if choice.delta.content:
                        yield choice.delta.content

    def complete(self, prompt: str, *, model: str | None = None, **sampling: Any) -> Completion:
        """What follows a text, without a chat template.

        Raises:
            openai.APIError: the engine refused it, or ended.
        """
        from swift_dist.serving.inference.client import arguments

        completion: Completion = self.client.completions.create(
            prompt=prompt, **arguments(model or self.model, sampling)
        )
        return completion

    def batch(
        self, items: Sequence[Messages], *, concurrency: int = 64, model: str | None = None, **sampling: Any
    ) -> list[ChatCompletion]:
        """The answers to conversations, in their order, so many asked at the same time, of all replicas.

        Raises:
            openai.APIError: one was refused; RunError: engines were lost again and again.
        """
        import asyncio
        import functools

        from swift_dist.serving.inference.batch import Asking, as_prompts, ask, run_async
        from swift_dist.serving.inference.pool import EnginePool, LostError
        from swift_dist.serving.inference.replicas import OwnedReplica

        if concurrency < 1:
            raise JobError("concurrency", f"is {concurrency}", "1 or more")
        asking = Asking(model or self.model, sampling, {})

        async def ask_all() -> list[ChatCompletion]:
            replicas = [OwnedReplica(replica) for replica in self._replicas]
            most = -(-concurrency // len(replicas))
            async with EnginePool(replicas, most) as pool, asyncio.TaskGroup() as tasks:
                sends = [functools.partial(ask, prompt=prompt, asking=asking) for prompt in as_prompts(items)]
                asked = [tasks.create_task(pool.ask(send)) for send in sends]
            return [task.result() for task in asked]

        self.url  # noqa: B018 - it is started
        try:
            return run_async(ask_all)
        except LostError as error:
            raise RunError(str(error)) from None

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """The embedding of each text; of a model of embeddings, or an engine with ``task="embed"``.

        Raises:
            RunError: it is one of text. openai.APIError: the engine refused it, or ended.
        """
        if self._engines.served.options.task != "embed":
            raise RunError("this engine generates text", 'swift_dist.Engine(MODEL, task="embed")')
        answer = self.client.embeddings.create(model=self.model, input=list(texts), encoding_format="float")
        return [entry.embedding for entry in sorted(answer.data, key=lambda entry: entry.index)]

    def _request(self, messages: Messages, model: str | None, sampling: Mapping[str, Any]) -> dict[str, Any]:
        from swift_dist.serving.inference.client import arguments

        said = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        return {"messages": said, **arguments(model or self.model, sampling)}


def infer(**keys: Any) -> dict[str, Any]:
    """`swift-dist infer` of a prompt or a dataset.

    >>> infer(model="runs/x", dataset="rows.jsonl", output="answers.jsonl", max_tokens=64)  # doctest: +SKIP
    {'output': '/.../answers.jsonl', 'rows': 100, 'failed': 0, ...}

    Args:
        keys: those of the command line.

    Returns:
        What ``--json`` prints: see `swift_dist.serving.infer.run`.

    Raises:
        JobError: the keys are wrong; nothing was started. RunError: no engine could be started, or it failed.
    """
    from swift_dist.serving.infer import ALIASES, InferOptions, run

    options = build(InferOptions, [_listed(keys)], ALIASES)
    if options.prompt is None and not options.dataset:
        raise JobError("prompt", "neither prompt nor dataset is given", "a conversation: swift_dist.Engine")
    result = run(options)
    assert result is not None
    return result


def _listed(keys: Mapping[str, Any]) -> dict[str, Any]:
    """A text where the command line takes one word or several."""
    several = {"dataset", "val_dataset", "adapters", "stop", "engine_args"}
    return {key: [value] if key in several and isinstance(value, str) else value for key, value in keys.items()}
