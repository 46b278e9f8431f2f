"""A dataset's rows answered, as many at once as engines take: each exactly once, also after a kill."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from swift_dist.data.rows.prompts import Prompt
from swift_dist.serving.inference.client import arguments, as_json, as_run_error, reason_of
from swift_dist.serving.inference.journal import Journal
from swift_dist.serving.inference.pool import EnginePool, LostError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

T = TypeVar("T")
log = logging.getLogger(__name__)

OURS = ("response", "reference", "finish_reason", "tool_calls", "reasoning_content", "logprobs", "usage", "error")
"""Columns that an answered row gets; one of these names that the input has itself becomes ``input_NAME``."""
_SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class Asking:
    """How each row is asked.

    Attributes:
        model: name of the model or adapter that answers.
        chat, completion: fields of a request of either kind.
        system: text before conversations that have no system message.
        usage: whether rows get their counts of tokens.
    """

    model: str
    chat: Mapping[str, Any]
    completion: Mapping[str, Any]
    system: str | None = None
    usage: bool = False


def messages_of(prompt: Prompt, system: str | None) -> list[dict[str, Any]]:
    messages = list(prompt.messages)
    if system is not None and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


async def ask(client: AsyncOpenAI, prompt: Prompt, asking: Asking) -> Any:
    """One request for one row; the openai client's answer."""
    if prompt.text is not None:
        return await client.completions.create(prompt=prompt.text, **arguments(asking.model, asking.completion))
    tools = {"tools": list(prompt.tools)} if prompt.tools else {}
    messages: Any = messages_of(prompt, asking.system)
    fields = arguments(asking.model, {**asking.chat, **tools})
    return await client.chat.completions.create(messages=messages, **fields)


def answered_row(prompt: Prompt, answer: Any, asking: Asking) -> dict[str, Any]:
    """The row of the output: the input's columns, and beside them what was answered.

    With ``n`` above 1 each of the columns of an answer is a list.
    """
    row = _kept(prompt)
    choices = sorted(answer.choices, key=lambda choice: choice.index)
    columns: dict[str, list[Any]] = {"response": [], "finish_reason": []}
    for number, choice in enumerate(choices):
        said = choice.message if hasattr(choice, "message") else None
        columns["response"].append(choice.text if said is None else said.content or "")
        columns["finish_reason"].append(choice.finish_reason)
        found = {"logprobs": as_json(choice.logprobs)} if choice.logprobs is not None else {}
        if said is not None:
            if said.tool_calls:
                found["tool_calls"] = [as_json(call) for call in said.tool_calls]
            thoughts = getattr(said, "reasoning_content", None) or getattr(said, "reasoning", None)
            if thoughts:
                found["reasoning_content"] = thoughts
        for name, value in found.items():
            columns.setdefault(name, [None] * number)
            columns[name] += [None] * (number - len(columns[name])) + [value]
    many = len(choices) > 1
    for name, values in columns.items():
        row[name] = values + [None] * (len(choices) - len(values)) if many else values[0]
    if asking.usage and answer.usage is not None:
        row["usage"] = as_json(answer.usage)
    return row


def failed_row(prompt: Prompt, reason: str) -> dict[str, Any]:
    return {**_kept(prompt), "response": None, "error": f"{prompt.origin}: {reason}"}


def _kept(prompt: Prompt) -> dict[str, Any]:
    row = {
        f"input_{name}" if name in OURS else name: value
        for name, value in prompt.given.items()
        if name != prompt.answer_column
    }
    if prompt.reference is not None:
        row["reference"] = prompt.reference
    return row


class Batch:
    """One pass over the rows that are not answered yet.

    Args:
        prompts: the rows, all of them, in order. total: how many.
        journal: entered, and not finished.
        pool: not entered yet.
        concurrency: rows that are asked at the same time.
    """

    def __init__(
        self,
        prompts: Iterator[Prompt],
        total: int,
        journal: Journal,
        pool: EnginePool,
        asking: Asking,
        concurrency: int,
    ) -> None:
        self._journal, self._pool, self._asking = journal, pool, asking
        self._concurrency = concurrency
        self._rows = ((index, prompt) for index, prompt in enumerate(prompts) if journal.todo(index))
        done = len(journal.done) - len(journal.failed)
        self.progress = BatchProgress(total, done, len(journal.failed))

    async def run(self) -> None:
        """Ask until every row has an answer or an error.

        Raises:
            RunError: no engine can be had, or the output cannot be written. What is answered stays answered.
        """
        todo = self.progress.total - self.progress.done
        with self.progress:
            async with self._pool, asyncio.TaskGroup() as tasks:
                for _ in range(min(self._concurrency, todo)):
                    tasks.create_task(self._work())

    async def _work(self) -> None:
        for index, prompt in self._rows:
            tokens = 0
            problem = prompt.problem
            if prompt.text is not None and "response_format" in self._asking.chat:
                problem = "a text to go on with, and --json_schema is of answers in a conversation"
            row, failed = failed_row(prompt, problem), True
            if not problem:
                row, tokens, failed = await self._answer(prompt)
            self._journal.add(index, row, failed=failed)
            self.progress.add(tokens, failed=failed)

    async def _answer(self, prompt: Prompt) -> tuple[dict[str, Any], int, bool]:
        """(row of the output, tokens that were generated, whether it failed)."""
        import openai

        def send(client: AsyncOpenAI) -> Awaitable[Any]:
            self.progress.begin()
            return ask(client, prompt, self._asking)

        try:
            answer = await self._pool.ask(send)
        except LostError as error:
            return failed_row(prompt, str(error)), 0, True
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise as_run_error(error, "the server") from None  # every other row would be told the same
        except openai.APIError as error:
            return failed_row(prompt, reason_of(error)), 0, True
        tokens = answer.usage.completion_tokens if answer.usage is not None else 0
        return answered_row(prompt, answer, self._asking), tokens, False


class BatchProgress:
    """Rows, tokens/s and time left, on stderr: a bar on a terminal, a line every few seconds elsewhere.

    Args:
        total: rows. done: of those, answered by an earlier command; failed: that it could not answer.
    """

    def __init__(self, total: int, done: int, failed: int, stream: TextIO | None = None) -> None:
        self.total, self.done, self.tokens, self.failed = total, done, 0, 0
        self._first, self._stream = done, sys.stderr if stream is None else stream
        self._began: float | None = None
        self._shown = 0.0
        self._bar: Any = None
        if done or failed:
            log.info("going on: %d of %d rows are answered", done, total)

    def begin(self) -> None:
        """A request is sent: the engine's start does not count."""
        if self._began is None:
            self._began = self._shown = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the first request."""
        return time.monotonic() - self._began if self._began is not None else 0.0

    def add(self, tokens: int, *, failed: bool) -> None:
        now = time.monotonic()
        self.done += 1
        self.failed += failed
        self.tokens += tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, text=self._text())
        elif now - self._shown >= _SECONDS_BETWEEN_LINES or self.done == self.total:
            self._shown = now
            print(f"infer: {self.done}/{self.total} rows  {self._text()}", file=self._stream, flush=True)

    def _text(self) -> str:
        from swift_dist.runs.progress import human_count, human_seconds

        finished, seconds = self.done - self._first, self.seconds
        parts = [f"{self.failed} failed"] if self.failed else []
        if seconds > 0 and finished > 1:
            parts.append(f"{human_count(self.tokens / seconds)} tok/s")
            parts.append(f"{human_seconds(seconds * (self.total - self.done) / finished)} left")
        return "  ".join(parts)

    def __enter__(self) -> BatchProgress:
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (
                TextColumn("infer"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            console = Console(file=self._stream)
            self._bar = Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False)
            self._task = self._bar.add_task("infer", total=self.total, completed=self.done, text="starting")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def first_error(group: BaseExceptionGroup) -> BaseException:
    """What a task group failed with: the first of its tasks' errors."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def run_async(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine to its end from ordinary code, also where an event loop runs already, as in a notebook."""

    def run() -> T:
        try:
            return asyncio.run(main())
        except BaseExceptionGroup as group:
            raise first_error(group) from None

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def as_prompts(items: Sequence[str | Sequence[Mapping[str, Any]]]) -> list[Prompt]:
    """Prompts of a Python program: the text of a user's message, or messages as OpenAI has them."""
    found = []
    for number, item in enumerate(items):
        messages = [{"role": "user", "content": item}] if isinstance(item, str) else [dict(one) for one in item]
        found.append(Prompt(f"item {number}", {}, tuple(messages)))
    return found
