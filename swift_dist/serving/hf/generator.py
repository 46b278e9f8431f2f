"""The hf engine's generator: a model in a thread of its own, asked from an event loop.

async for event in generator.submit(prompt_ids, Sampling(max_tokens=20)):
    ...                                              # Token, Token, ..., Finished
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from swift_dist.serving.hf import model as models
from swift_dist.serving.hf import runners
from swift_dist.serving.hf.adapters import Adapters
from swift_dist.serving.hf.cache import Blocks, blocks_for
from swift_dist.serving.hf.guides import Guides
from swift_dist.serving.hf.requests import Event, Finished, GeneratorFailed, RequestFailed, Sampling, TextGenerator
from swift_dist.serving.hf.sampling import RowSampler
from swift_dist.serving.hf.scheduler import Running, Scheduler
from swift_dist.serving.hf.text import Detokenizer, StopTexts, decoder
from swift_dist.serving.options import ServedModel

log = logging.getLogger(__name__)


def started(served: ServedModel) -> TextGenerator:
    """What serves a model's task: text or embeddings.

    Raises:
        JobError, RunError: the model or an adapter cannot be served so.
    """
    if served.options.task != "embed":
        return Generator(served)
    from swift_dist.serving.hf.embedding import Embedder

    return Embedder(served)


class Generator:
    """Text from one model, for any number of requests at once (`requests.TextGenerator`).

    Args:
        served: the model, its options, and adapters that are loaded at once.

    Attributes:
        error: see `requests.TextGenerator`.

    Raises:
        JobError, RunError: the model or an adapter cannot be served so.
    """

    def __init__(self, served: ServedModel) -> None:
        loaded = models.load(served)
        self.tokenizer = loaded.tokenizer
        self._loaded = loaded
        self._runner = runners.runner(loaded, served.options)
        self.model_max_length = self._runner.length
        self._adapters = Adapters(loaded.model, served.options, batched=self._runner.batched)
        self._sound = runners.SoundCheck(loaded)
        for name, path in served.adapters.items():
            self._adapters.load(name, path)
        self._guides = Guides(loaded.tokenizer, loaded.vocabulary, list(loaded.ends))
        self._pieces: dict[int, bytes] = {}
        seed = served.options.seed  # none: replicas that begin together are not to draw alike
        self._numbers = itertools.count(secrets.randbits(62) if seed is None else seed * 1_000_003)
        self._scheduler = Scheduler(
            self._runner,
            calls=self._adapters.calls,
            piece=self._piece,
            guides=self._guides,
            check=self._check_model,
            most=served.options.max_num_seqs,
            most_adapters=served.options.max_loras,
        )
        self._wake = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._retired: dict[str, Future[None]] = {}  # adapters that go once no sequence uses them
        self._closing = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="hf-generator", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        return len(self._scheduler.waiting) + self._arriving

    @property
    def adapters(self) -> tuple[str, ...]:
        return self._adapters.names

    # asked from an event loop

    def submit(self, prompt: list[int], sampling: Sampling, adapter: str | None = None) -> AsyncIterator[Event]:
        """Start a request; see `requests.TextGenerator.submit`."""
        self._check_alive()
        self._check(prompt, sampling)
        if adapter is not None and adapter not in self._adapters.names:
            raise KeyError(adapter)
        matcher = None if sampling.guide is None else self._guides.matcher(sampling.guide)
        mail = _Mail(asyncio.get_running_loop())
        room = self.model_max_length - len(prompt)
        ends = () if sampling.ignore_eos else self._loaded.ends
        decode = decoder(self.tokenizer, sampling.skip_special_tokens)
        sequence = Running(
            tokens=list(prompt),
            prompt=len(prompt),
            limit=room if sampling.max_tokens is None else min(sampling.max_tokens, room),
            sampler=RowSampler(
                sampling, tuple(prompt), (*ends, *sampling.stop_token_ids), self._draws(sampling.seed), matcher
            ),
            detokenizer=Detokenizer(decode, prompt),
            stops=StopTexts(sampling.stop, sampling.include_stop),
            adapter=adapter,
            deliver=mail.deliver,
            blocks=Blocks(blocks_for(self.model_max_length) if self._runner.batched else 0),
        )
        self._send(lambda: self._add(sequence))
        return _Answer(mail, sequence)

    async def embed(self, prompts: list[list[int]]) -> list[list[float]]:
        """Refused: this generator's model was loaded for text (`embedding.Embedder` is for the other task)."""
        raise ValueError("this model is served for text; start it with --task embed for embeddings")

    async def load_adapter(self, name: str, path: str) -> None:
        """Load a PEFT folder between two steps; see `requests.TextGenerator`."""
        self._check_alive()
        await self._call(lambda: self._adapters.load(name, path))

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter once its sequences are done; see `requests.TextGenerator`."""
        self._check_alive()
        # It goes on by itself once begun: a caller that leaves does not keep the adapter half unloaded.
        gone: Future[None] = Future()
        await self._call(lambda: self._retire(name, gone))
        await asyncio.shield(asyncio.wrap_future(gone))

    def close(self) -> None:
        """End the thread; requests that are not finished get GeneratorFailed."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # helpers of these

    @property
    def _arriving(self) -> int:
        return len(self._inbox)

    def _check_alive(self) -> None:
        if self.error is not None:
            raise GeneratorFailed(f"the engine has ended: {self.error}") from self.error
        if self._closing:
            raise GeneratorFailed("the engine is closed")

    def _check(self, prompt: list[int], sampling: Sampling) -> None:
        """ValueError for what no request may ask."""
        length, vocabulary = self.model_max_length, self._loaded.vocabulary
        if not prompt:
            raise ValueError("the prompt is empty")
        if len(prompt) >= length:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens; with one token of answer the context of {length} is full"
            )
        if sampling.max_tokens is not None and len(prompt) + sampling.max_tokens > length:
            raise ValueError(
                f"the prompt's {len(prompt)} tokens and max_tokens={sampling.max_tokens} are more than the context of "
                f"{length} tokens"
            )
        limits = {
            "max_tokens": sampling.max_tokens is None or sampling.max_tokens >= 1,
            "temperature": 0 <= sampling.temperature < math.inf,
            "top_p": 0 < sampling.top_p <= 1,
            "top_k": sampling.top_k >= 0,
            "min_p": 0 <= sampling.min_p <= 1,
            "repetition_penalty": 0 < sampling.repetition_penalty < math.inf,
            "presence_penalty": math.isfinite(sampling.presence_penalty),
            "frequency_penalty": math.isfinite(sampling.frequency_penalty),
            "min_tokens": 0 <= sampling.min_tokens <= (length if sampling.max_tokens is None else sampling.max_tokens),
            "logprobs": sampling.logprobs is None or 0 <= sampling.logprobs <= vocabulary,
            "prompt_logprobs": sampling.prompt_logprobs is None or 0 <= sampling.prompt_logprobs <= vocabulary,
        }
        if wrong := [name for name, right in limits.items() if not right]:
            raise ValueError(f"{wrong[0]}={getattr(sampling, wrong[0])} is out of its range")
        ids = {"prompt": prompt, "logit_bias": sampling.logit_bias, "stop_token_ids": sampling.stop_token_ids}
        for name, some in ids.items():
            if outside := [i for i in some if not 0 <= i < vocabulary]:
                raise ValueError(f"{name}: {outside[0]} is no token of this model ({vocabulary} tokens)")
        if any(not math.isfinite(bias) for bias in sampling.logit_bias.values()):
            raise ValueError("logit_bias: not a finite number")

    def _draws(self, seed: int | None) -> torch.Generator:
        draws = torch.Generator()
        return draws.manual_seed((next(self._numbers) if seed is None else seed) % 2**63)

    def _piece(self, token: int) -> bytes:
        if token not in self._pieces:
            self._pieces[token] = self._guides.piece(token)
        return self._pieces[token]

    async def _call(self, task: Callable[[], Any]) -> Any:
        """Run something in the engine's thread, between two steps."""
        done: Future[Any] = Future()

        def run() -> None:
            if not done.set_running_or_notify_cancel():
                return  # whoever asked has left
            try:
                done.set_result(task())
            except BaseException as error:
                done.set_exception(error)

        self._send(run)
        return await asyncio.wrap_future(done)

    def _send(self, task: Callable[[], None]) -> None:
        with self._wake:
            self._check_alive()
            self._inbox.append(task)
            self._wake.notify()

    # the engine's thread

    def _run(self) -> None:
        error: BaseException = GeneratorFailed("the engine is closed")
        try:
            with torch.inference_mode():
                while self._receive():
                    if self._scheduler.busy:
                        self._scheduler.step()
                    self._unload_unused()
        except BaseException as failure:
            log.exception("the engine's thread ends")
            self.error = failure
            error = GeneratorFailed(f"the engine has ended: {failure}")
        with self._wake:
            self._closing = True
            tasks, self._inbox = self._inbox, []
        for task in tasks:
            task()
        self._scheduler.fail(error)
        for gone in self._retired.values():
            gone.set_exception(error)

    def _check_model(self) -> None:
        """After an error: raises where the model is not what it was."""
        for call, _ in self._adapters.calls([None]):
            self._sound.check(call)

    def _add(self, sequence: Running) -> None:
        if sequence.adapter is None or self._adapters.has(sequence.adapter):
            self._scheduler.add(sequence)
        else:  # unloaded since `submit` looked: without this the model alone would answer
            sequence.deliver([RequestFailed(f"the adapter {sequence.adapter!r} has been unloaded")])

    def _retire(self, name: str, gone: Future[None]) -> None:
        self._adapters.retire(name)
        self._retired[name] = gone

    def _unload_unused(self) -> None:
        for name in [name for name in self._retired if not self._scheduler.uses(name)]:
            self._adapters.unload(name)
            self._scheduler.forget(name)
            self._retired.pop(name).set_result(None)

    def _receive(self) -> bool:
        """Do what came in, after waiting for it where there is nothing else to do; False once closed."""
        with self._wake:
            while not (self._inbox or self._scheduler.busy or self._closing):
                self._wake.wait()
            if self._closing:
                return False
            tasks, self._inbox = self._inbox, []
        for task in tasks:
            task()
        return True


class _Mail:
    """Where the engine's thread puts a request's events for an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.events: asyncio.Queue[Event | BaseException] = asyncio.Queue()

    def deliver(self, events: Sequence[Event | BaseException]) -> None:
        """Called in the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._put, list(events))

    def _put(self, events: list[Event | BaseException]) -> None:
        for event in events:
            self.events.put_nowait(event)


class _Answer(AsyncIterator[Event]):
    """A request's events as its caller reads them. Closed or forgotten, it cancels."""

    def __init__(self, mail: _Mail, sequence: Running) -> None:
        self._mail, self._sequence = mail, sequence
        self._over = False

    async def __anext__(self) -> Event:
        if self._over:
            raise StopAsyncIteration
        event = await self._mail.events.get()
        if isinstance(event, BaseException):
            self._over = True
            raise event
        self._over = isinstance(event, Finished)
        return event

    async def aclose(self) -> None:
        """Stop generating."""
        self._over = True
        self._sequence.cancelled = True

    def __del__(self) -> None:
        self._sequence.cancelled = True
