"""What a request asks of the hf engine's generator, and what it answers. Values only: no torch, no HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from swift_dist.serving.tool_parsers.base import CallFormat

GuideKind = Literal["json_schema", "json_object", "regex", "choice", "grammar", "calls"]


@dataclass(frozen=True)
class Thinking:
    """What comes before the text that is guided.

    Attributes:
        open, close: the tags around it.
        begun: the prompt ends within it; otherwise the answer begins with it, or has none.
    """

    open: str
    close: str
    begun: bool


@dataclass(frozen=True)
class Calls:
    """Free text with calls of tools.

    Attributes:
        formats: how a call may be written.
        tools: name and JSON schema of its arguments; no schema: any arguments.
        parallel: there may be more than one call.
    """

    formats: tuple[CallFormat, ...]
    tools: tuple[tuple[str, str | None], ...]
    parallel: bool = True


@dataclass(frozen=True)
class Guide:
    """What the text must be: the sampler sees only tokens that can still lead there.

    Attributes:
        kind: json_object needs no value; grammar is Lark's notation, or GBNF (``root ::= ...``).
        value: a JSON schema, a regular expression or a grammar as text; the alternatives of a choice; the calls.
        thinking: what may or must come first.
    """

    kind: GuideKind
    value: str | tuple[str, ...] | Calls = ""
    thinking: Thinking | None = None


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; names and meanings are OpenAI's, and vLLM's where OpenAI has none.

    Attributes:
        max_tokens: of the answer; None: as many as the context has room for.
        temperature: 0 is greedy.
        top_k: 0 is off.
        repetition_penalty: on tokens of prompt and answer, as transformers.
        presence_penalty, frequency_penalty: on tokens of the answer.
        logit_bias: added to the logits of these token ids.
        stop: texts that end the answer; they are not part of it unless `include_stop`.
        stop_token_ids: beside the model's own end tokens.
        ignore_eos: the model's own end tokens do not end the answer.
        min_tokens: before which no end token is drawn and no stop text looked for.
        seed: the same seed, prompt and options give the same answer, whatever else is in the batch.
        logprobs: how many alternatives are reported with each token, 0 for the token alone, None for nothing. They are
            the model's own distribution: before temperature, penalties, bias and guide.
        prompt_logprobs: the same for the prompt's tokens, reported at once as a `Prompt`.
        skip_special_tokens: whether special tokens are left out of the text.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    guide: Guide | None = None
    skip_special_tokens: bool = True


@dataclass(frozen=True)
class Alternative:
    """A token that could have been there, and its log-probability. `piece`: its bytes, maybe part of a character."""

    id: int
    piece: bytes
    logprob: float


@dataclass(frozen=True)
class Token:
    """A token of the answer, an end token included.

    Attributes:
        text: what may be shown from here on: "" while a character is incomplete or a stop text may have begun. The
            texts of an answer's tokens add up to the answer.
        piece: the token's own bytes.
        logprob: None unless asked for.
        top: the most probable tokens, best first; as many as asked for.
    """

    id: int
    text: str
    piece: bytes = b""
    logprob: float | None = None
    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """The prompt's tokens with what the model thought of each. The first has no logprob; texts are the pieces'."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Finished:
    """The end of an answer; the last event of a request.

    Attributes:
        reason: stop (an end token, a stop text, a guide that is complete) or length.
        stop: the stop text or the id of the end token that was met; None for a length.
        prompt_tokens, completion_tokens: how many there were; an end token counts.
        cached_tokens: of the prompt, those that an earlier request had computed.
    """

    reason: Literal["stop", "length"]
    stop: str | int | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


Event = Prompt | Token | Finished


class GeneratorFailed(RuntimeError):
    """The engine's thread ended with an error: nothing that was asked of it will be answered."""


class RequestFailed(RuntimeError):
    """An error ended this request while it was computed; the engine goes on with the others."""


class TextGenerator(Protocol):
    """What the HTTP layer may use of `generator.Generator`.

    Attributes:
        tokenizer: transformers'.
        model_max_length: tokens of prompt and answer.
        running, waiting: sequences in the batch; requests that wait for a place in it.
        error: what ended the engine's thread; None while it lives, and where it was closed.
    """

    tokenizer: object
    model_max_length: int
    error: BaseException | None

    @property
    def running(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    @property
    def adapters(self) -> tuple[str, ...]: ...

    def submit(self, prompt: list[int], sampling: Sampling, adapter: str | None = None) -> AsyncIterator[Event]:
        """Start a request at once; the iterator gives its events. Closing it (``aclose``) cancels: the sequence leaves
        the batch at the next step.

        Raises (here, not at the first event):
            ValueError: the prompt is empty or too long, an option is out of its range, the guide is wrong.
            KeyError: no such adapter.
            GeneratorFailed: the engine is dead; also raised by the iterator.

        The iterator raises RequestFailed where this request alone, or those computed in one forward with it, failed.
        """
        ...

    async def embed(self, prompts: list[list[int]]) -> list[list[float]]:
        """One vector a prompt. ValueError: too long, or a model for text."""
        ...

    async def load_adapter(self, name: str, path: str) -> None:
        """Load a PEFT folder. ValueError: it cannot be loaded, or the name is taken."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter: new requests are refused at once, running ones end first. KeyError: no such adapter."""
        ...

    def close(self) -> None:
        """End the engine's thread; whatever runs is broken off with GeneratorFailed."""
        ...
