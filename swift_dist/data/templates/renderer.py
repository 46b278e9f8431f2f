"""A tokenizer's own chat template: rendering, and what a probe tells about it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from swift_dist.data.rows.base import BadRowError
from swift_dist.data.templates.quirks import quirk_of

Messages = Sequence[dict[str, Any]]

_QUESTION, _ANSWER = "zqx question", "zqx answer"
_PROBE: list[dict[str, Any]] = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
_ARGUMENTS = {"zqx": "zqx"}
_FUNCTION = {"name": "zqx", "arguments": _ARGUMENTS}
_CALL: dict[str, Any] = {"id": "call00001", "type": "function", "function": _FUNCTION}
_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


class Renderer:
    """Renders conversations by the chat template that came with a tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers with a chat template.
        thinking: ``template.thinking``; "drop" tells templates that know ``enable_thinking`` that there is none.
        now: the time that templates which write a date get, so that texts of one conversation agree.
    """

    def __init__(self, tokenizer: Any, thinking: str, now: datetime) -> None:
        self.tokenizer = tokenizer
        given = tokenizer.chat_template
        self.source: str = given if isinstance(given, str) else "\n".join((given or {}).values())
        self.quirk = quirk_of(self.source)
        self._arguments: dict[str, Any] = {}
        self._now = now
        if thinking == "drop" and "enable_thinking" in self.source:
            self._arguments["enable_thinking"] = False

    def text(self, messages: Messages, tools: Sequence[Any] | None = None, prompt: bool = False) -> str:
        """The conversation as the model sees it.

        Args:
            prompt: end with what opens the assistant's next turn.

        Raises:
            BadRowError: the template refuses the conversation.
        """
        if not messages:
            raise BadRowError("the conversation begins with the assistant's turn: nothing stands before it")
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self._dated(tools),
                tools=list(tools) if tools else None,
                add_generation_prompt=prompt,
                tokenize=False,
                **self._arguments,
            )
        except Exception as error:  # templates are programs of others: raise_exception, and whatever goes wrong in them
            raise _refused(error, messages) from None

    def marked(self, messages: Messages, tools: Sequence[Any] | None = None) -> tuple[str, list[tuple[int, int]]]:
        """The conversation, and what the template's own ``{% generation %}`` marks say is generated of it.

        Returns:
            The text, and of each mark [first character, after the last), without what it holds after the turn's end.

        Raises:
            BadRowError: the template refuses the conversation, or a mark does not hold the turn's end.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[list(messages)],
                tools=list(tools) if tools else None,
                chat_template=self._dated(tools),
                return_assistant_tokens_mask=True,
                add_generation_prompt=False,
                **{**self.tokenizer.special_tokens_map, **self._arguments},
            )
        except Exception as error:
            raise _refused(error, messages) from None
        text, marks = rendered[0][0], rendered[1][0]
        return text, [(start, self.end_of_turn(text[:end], start)) for start, end in marks]

    def _dated(self, tools: Sequence[Any] | None) -> str:
        """The template (some models have another one for tools) with the time it asks for written into it."""
        source = self.tokenizer.get_chat_template(None, list(tools) if tools else None)
        return _DATE.sub(lambda call: json.dumps(self._now.strftime(call[2])), source)

    @cached_property
    def added_token(self) -> re.Pattern[str]:
        """Matches the tokenizer's added tokens (such as ``<|im_end|>``)."""
        tokens = {token.content for token in self.tokenizer.added_tokens_decoder.values()} - {""}
        tokens = {token for token in tokens if not token.isspace()}
        longest_first = sorted(tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def control(self) -> re.Pattern[str]:
        """Matches the special tokens that order a conversation: those that the template writes around a question and
        its answer, those that end a turn, and the tokenizer's BOS and EOS. A tokenizer makes them of text that only
        looks like them."""
        tokenizer = self.tokenizer
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        probe = self.text(_PROBE[:1], prompt=True) + self.text(_PROBE)
        written = set(self.added_token.findall(probe))
        tokens = (special & written) | {tokenizer.bos_token, tokenizer.eos_token} | set(self.ends)
        # Some prompts open the thinking, and answers write these tags out.
        tokens = {token for token in tokens if token} - {"<think>", "</think>"}
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """The tokens that end an assistant's turn; () where none is found."""
        if self.quirk and self.quirk.ends:
            return self.quirk.ends
        text = self.text(_PROBE)
        tail = text[text.rfind(_ANSWER) + len(_ANSWER) :]
        found = self.added_token.search(tail)
        return (found.group(),) if found and not tail[: found.start()].strip() else ()

    @cached_property
    def next_header_ends(self) -> bool:
        """See `Quirk.next_header_ends`; False for a template of that family that does write the end itself."""
        if self.quirk is None or not self.quirk.next_header_ends:
            return False
        return not self.text(_PROBE).endswith(self.quirk.ends)

    @cached_property
    def arguments_as_text(self) -> bool:
        """Whether the template takes a call's arguments as JSON text (most take the object): it refuses the object, or
        writes it as Python does, with quotes that are not JSON's (InternLM2)."""
        as_text = {**_CALL, "function": {**_FUNCTION, "arguments": json.dumps(_ARGUMENTS)}}
        written = self._written([_PROBE[0], {"role": "assistant", "content": "", "tool_calls": [_CALL]}])
        return (written is None or str(_ARGUMENTS) in written) and self._takes(tool_calls=[as_text])

    @cached_property
    def results_need_name(self) -> bool:
        """Whether the template refuses a tool's result that does not name the tool (Hermes 2 Pro)."""
        called = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
        result = {"role": "tool", "tool_call_id": _CALL["id"], "content": "zqx result"}
        without, named = ([_PROBE[0], called, message] for message in (result, {**result, "name": "zqx"}))
        return self._written(without) is None and self._written(named) is not None

    @cached_property
    def reads_thinking(self) -> bool:
        """Whether the template writes the ``reasoning_content`` of a conversation's last message."""
        return self._takes(content=_ANSWER, reasoning_content="zqx thought")

    @cached_property
    def splits_thinking(self) -> bool:
        """Whether the template knows the <think> tags in a message's text."""
        return "</think>" in self.source

    @property
    def _thoughtful(self) -> dict[str, Any]:
        """The probe's answer with thinking before it, as `Template` gives it to this template."""
        if self.reads_thinking:
            return {**_PROBE[1], "reasoning_content": "zqx thought"}
        return {**_PROBE[1], "content": f"<think>\nzqx thought\n</think>\n\n{_ANSWER}"}

    def _takes(self, **message: Any) -> bool:
        """Whether the template writes this answer."""
        text = self._written([_PROBE[0], {"role": "assistant", "content": "", **message}])
        return text is not None and message.get("reasoning_content", "zqx") in text

    def _written(self, messages: Messages) -> str | None:
        """The conversation; None if the template refuses it."""
        try:
            return self.text(messages)
        except BadRowError:
            return None

    def problem(self) -> str:
        """Why no exact mask can be had even of one question and its answer; "" where it can."""
        prompt = self.text(_PROBE[:1], prompt=True)
        text = self.text([_PROBE[0], self._thoughtful] if opens_thinking(prompt) else _PROBE)
        if _ANSWER not in text:
            return "it leaves the answer out"
        if self.quirk and self.quirk.answer:
            return "" if self.ends else "no special token ends the assistant's turn"
        if not text.startswith(prompt):
            return f"its generation prompt ({prompt[-40:]!r}) is not how it begins the turn in a conversation"
        opening = text[len(prompt) : text.rfind(_ANSWER)]
        if prompt == self.text(_PROBE[:1]) and opening.strip():
            return f"it ignores add_generation_prompt, so that the header {opening!r} would count as generated"
        if not self.ends:
            return "no special token ends the assistant's turn, so the model would not learn to stop"
        whole = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        places = zip(whole["input_ids"], whole["offset_mapping"], strict=True)
        before = [token for token, (start, _) in places if start < len(prompt)]
        if before != self.tokenizer(prompt, add_special_tokens=False)["input_ids"]:
            return "the tokenizer makes other tokens of its generation prompt alone than where an answer follows"
        return ""

    @cached_property
    def marks_agree(self) -> bool:
        """Whether the template has marks, and they begin and end a plain answer where `problem`'s rule does."""
        if not re.search(r"{%-?\s*generation\s*-?%}", self.source) or self.problem() or self.next_header_ends:
            return False
        text, start = self.text(_PROBE), len(self.text(_PROBE[:1], prompt=True))
        try:
            return self.marked(_PROBE) == (text, [(start, self.end_of_turn(text, start))])
        except BadRowError:  # another piece is marked that does not end as a turn does (Phi-3's <|endoftext|>)
            return False

    def end_of_turn(self, text: str, start: int) -> int:
        """The character after the token that ends the turn which `text` ends with, and of which `start` is the first.

        Raises:
            BadRowError: there is no such token, or more than white space and special tokens after it.
        """
        found = max(((text.rfind(token, start), token) for token in self.ends), default=(-1, ""))
        if found[0] < 0:
            raise BadRowError(f"the chat template does not end the turn with {' or '.join(self.ends)}")
        end = found[0] + len(found[1])
        if self.added_token.sub("", text[end:]).strip():
            raise BadRowError(f"the chat template writes {text[end:][:40]!r} after the token that ends the turn")
        return end


def opens_thinking(prompt: str) -> bool:
    """Whether a generation prompt holds the beginning of the thinking."""
    return prompt.rstrip().endswith("<think>")


def _refused(error: Exception, messages: Messages) -> BadRowError:
    tools = any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
    hint = " (template.agent writes calls and results of tools as text)" if tools else ""
    return BadRowError(f"the chat template refuses the conversation: {error or type(error).__name__}{hint}")
