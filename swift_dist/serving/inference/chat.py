"""A conversation in the terminal, or over pipes: a line is a message, its answer is written as it is generated."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from swift_dist.errors import RunError
from swift_dist.serving.inference.client import arguments, as_run_error, reason_of

if TYPE_CHECKING:
    from openai import OpenAI

log = logging.getLogger(__name__)

HELP = """\
a line is a message; one that ends with \\ goes on in the next line
/reset          forget the conversation
/system TEXT    begin anew with this system message (without a text: the model's own, if it has one)
/adapter NAME   let this adapter answer from now on; without a name: which there are
/help           this
/exit           end (Ctrl-D too); Ctrl-C stops an answer"""


@dataclass
class Chat:
    """The state of a conversation.

    Attributes:
        connect: a client of a server that runs; called before each answer.
        model: what answers now; models: all that may.
        fields: of a request.
        system: text of the system message.
        turns: messages after it.
    """

    connect: Callable[[], OpenAI]
    model: str
    models: Sequence[str]
    fields: Mapping[str, Any]
    system: str | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)

    def messages(self) -> list[dict[str, Any]]:
        return [*([{"role": "system", "content": self.system}] if self.system is not None else []), *self.turns]

    def command(self, line: str) -> str | None:
        """Do what a line that begins with / says; returns what to tell. None: end."""
        name, _, rest = line[1:].strip().partition(" ")
        rest = rest.strip()
        if name in ("exit", "quit"):
            return None
        if name == "help":
            return HELP
        if name == "reset":
            self.turns.clear()
            return "the conversation is forgotten"
        if name == "system":
            self.system = rest or None
            self.turns.clear()
            return "a new conversation " + ("with this system message" if rest else "without one of yours")
        if name == "adapter":
            return self._use(rest)
        return f"unknown command /{name}; /help lists them"

    def _use(self, name: str) -> str:
        if name and name not in self.models:
            return f"{name} is not loaded; there are {', '.join(self.models)}"
        self.model = name or self.model
        return f"{self.model} answers" if name else f"there are {', '.join(self.models)}; {self.model} answers"

    def answer(self, text: str, write: Callable[[str, bool], None]) -> None:
        """Send a message and write the answer as it comes; both are kept.

        Of an answer that is interrupted the part that came is kept. A message without an answer is not.

        Args:
            write: takes a piece of the answer, and whether it is reasoning.

        Raises:
            KeyboardInterrupt: passed on; the server stops generating.
            RunError: the server refused, or is gone.
        """
        self.turns.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            with contextlib.closing(self._pieces()) as incoming:  # closing it ends the generation
                for piece, is_thought in incoming:
                    if not is_thought:
                        pieces.append(piece)
                    write(piece, is_thought)
        finally:
            if "".join(pieces).strip():
                self.turns.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.turns.pop()

    def _pieces(self) -> Generator[tuple[str, bool], None, None]:
        import openai

        client = self.connect()
        messages: Any = self.messages()
        try:
            with client.chat.completions.create(
                messages=messages, stream=True, **arguments(self.model, self.fields)
            ) as stream:
                for chunk in stream:
                    for choice in chunk.choices:
                        thought = getattr(choice.delta, "reasoning_content", None) or getattr(
                            choice.delta, "reasoning", None
                        )
                        if thought:
                            yield thought, True
                        if choice.delta.content:
                            yield choice.delta.content, False
        except openai.APIConnectionError as error:
            raise as_run_error(error, str(client.base_url)) from None
        except openai.APIError as error:
            raise RunError(reason_of(error), _remedy(reason_of(error))) from None
        except OSError as error:  # the stream broke
            raise RunError(f"the answer broke off: {error}") from None


def _remedy(reason: str) -> str:
    if "chat template" in reason or "chat_template" in reason:
        return "--chat_template FILE gives one; --complete goes on with a text without any"
    return ""


def talk(chat: Chat, source: TextIO | None = None, out: TextIO | None = None) -> int:
    """Read lines until the end and answer each.

    On a terminal: a prompt, colours, Ctrl-C stops an answer and the line editor's history works. Elsewhere the output
    holds the answers alone, one after the other.

    Returns:
        how many messages failed.
    """
    source, out = source or sys.stdin, out or sys.stdout
    is_terminal = source.isatty()
    told = out if is_terminal else sys.stderr
    if is_terminal:
        _edit_lines()
        print(f"{chat.model}  (/help, Ctrl-D ends)", file=told, flush=True)
    failed = 0
    for text in _lines(source, is_terminal):
        if text.startswith("/"):
            said = chat.command(text)
            if said is None:
                break
            print(said, file=told, flush=True)
            continue
        writer = _Writer(out, is_terminal)
        try:
            chat.answer(text, writer)
            print(file=out, flush=True)
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print("\n(stopped)", file=told, flush=True)
        except RunError as error:
            failed += 1
            print(f"\n{error}" if is_terminal else f"swift-dist: {error}", file=told, flush=True)
        finally:
            writer.end()
    return failed


class _Writer:
    """Writes pieces at once; reasoning is dim on a terminal and left out elsewhere."""

    def __init__(self, out: TextIO, is_terminal: bool) -> None:
        self._out, self._is_terminal, self._thinking = out, is_terminal, False

    def __call__(self, piece: str, is_thought: bool) -> None:
        if is_thought and not self._is_terminal:
            return
        if is_thought != self._thinking:
            self._out.write("\x1b[2m" if is_thought else "\x1b[0m\n")
            self._thinking = is_thought
        self._out.write(piece)
        self._out.flush()

    def end(self) -> None:
        """Give the terminal its colour back."""
        if self._thinking:
            self._out.write("\x1b[0m")
            self._out.flush()


def _edit_lines() -> None:
    """The arrow keys edit and bring back lines."""
    try:
        import readline  # noqa: F401 - input() uses it once it is imported
    except ImportError:
        log.debug("no readline: lines are not edited")


def _lines(source: TextIO, is_terminal: bool) -> Iterator[str]:
    """Messages and commands, without those that are blank."""
    held: list[str] = []
    while True:
        try:
            if is_terminal and source is sys.stdin:
                line = input("... " if held else "> ")
            else:
                line = source.readline()
                if not line:
                    break
        except EOFError:
            print(flush=True)
            break
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            held.clear()
            print("\n(Ctrl-D or /exit ends)", flush=True)
            continue
        line = line.rstrip("\n")
        if line.endswith("\\"):
            held.append(line[:-1])
            continue
        text, held = "\n".join([*held, line]).strip(), []
        if text:
            yield text
    if "".join(held).strip():
        yield "\n".join(held).strip()
