"""From a row to token ids, with the weight of each token in the loss. The model's own chat template is what counts.

A template is made in each worker process; pickled, it goes there as its arguments.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np

from swift_dist.config.finetune import TemplateSection
from swift_dist.data.rows.base import BadRowError, Row
from swift_dist.data.templates.agents._turns import as_json
from swift_dist.data.templates.align import token_weights
from swift_dist.data.templates.base import Encoded
from swift_dist.data.templates.loss_scale import LOSS_SCALES, weighted_ranges
from swift_dist.data.templates.renderer import Renderer
from swift_dist.data.templates.turns import Spans, check_context, name_results, spans_of, split_thinking
from swift_dist.errors import JobError

Message = dict[str, Any]

_THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
_ROLES = ("system", "developer", "user", "assistant", "tool")


def load_template(tokenizer_path: str, section: TemplateSection, trust_remote_code: bool = False) -> Template:
    """The template of a model's folder.

    Raises:
        JobError: there is no tokenizer, or none whose tokens know their place in the text.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise JobError("model", f"no tokenizer in {tokenizer_path}: {error}", "give a folder with one") from None
    template = Template(tokenizer, section, name=tokenizer_path)
    template._made_by = (tokenizer_path, section, trust_remote_code)
    return template


class Template:
    """Encodes rows.

    Args:
        tokenizer: a fast tokenizer of transformers.
        section: the job's template section.
        name: for messages to people.

    Raises:
        JobError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any, section: TemplateSection, *, name: str = "") -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise JobError(
                "model",
                f"the tokenizer {name or type(tokenizer).__name__} does not say where its tokens lie in the text",
                "save it as a fast tokenizer (tokenizer.json)",
            )
        self.tokenizer, self.section, self.name = tokenizer, section, name
        self._now = datetime.fromisoformat(section.date) if section.date else datetime.now()
        self._made_by: tuple[str, TemplateSection, bool] | None = None

    def __reduce__(self):
        state = {"_now": self._now}  # workers that start after midnight write the same date
        if self._made_by is not None:
            return (load_template, self._made_by, state)
        return (_make, (self.tokenizer, self.section, self.name), state)

    def check(self) -> None:
        """Raise JobError if conversations cannot be encoded with exact masks. Rows of plain text need no check."""
        remedy = "use a model whose tokenizer has another chat template, or give it one (chat_template.jinja)"
        if not self.tokenizer.chat_template:
            raise JobError("model", f"the tokenizer {self.name} has no chat template", remedy)
        try:
            problem = self._renderer.problem()
        except BadRowError as error:
            problem = str(error)
        if problem and self.section.loss_scale != "all":
            raise JobError("template", f"the chat template of {self.name or 'the tokenizer'}: {problem}", remedy)

    def encode_all(self, row: Row) -> list[Encoded]:
        """The sequences of a row, in the order of the conversation: one, as `encode` makes it, where that can be.

        Turns that the chat template rewrites when more messages follow learn from sequences of their own, unless
        ``template.rewritten_turns: refuse``: each turn from exactly one, which ends with it or holds it as the model
        would have generated it.

        Raises:
            BadRowError: as `encode`.
        """
        if row.text is not None or row.label is not None or row.num_answer:
            return [self.encode(row)]
        return self._conversation(row.messages, row.tools, 0, apart=self.section.rewritten_turns == "apart")

    def encode(self, row: Row) -> Encoded:
        """One sequence: a conversation, a judged answer (weights on the answer only), text, or what to classify.

        Of a text or conversation with a label all weights are 0; of a text with as many labels as words see
        `encode_words`.

        Raises:
            BadRowError: the row cannot be encoded, or not in one sequence, or no token of it learns.
        """
        classified = row.label is not None and not row.num_answer
        if classified and row.text is not None and _is_list(row.label) and len(row.label) == row.text.count(" ") + 1:
            return self.encode_words(row)
        if row.text is not None:
            encoded = self.encode_text(row.text)
        elif classified:
            encoded = self._classified(row)
        else:
            return self._conversation(row.messages, row.tools, row.num_answer)[0]
        return Encoded(encoded.ids, np.zeros_like(encoded.weights)) if classified else encoded

    def encode_pair(self, row: Row) -> tuple[Encoded, Encoded]:
        """(chosen, rejected) of a preference pair: the same prompt, weights on the answers only.

        Raises:
            BadRowError: as `encode`, or the template writes the prompt differently before the two answers.
        """
        if not row.num_answer or not row.rejected:
            raise BadRowError("the row is no preference pair")
        prompt = row.messages[: len(row.messages) - row.num_answer]
        (chosen,) = self._conversation(row.messages, row.tools, row.num_answer)
        (rejected,) = self._conversation((*prompt, *row.rejected), row.tools, len(row.rejected))
        first = [int(np.flatnonzero(encoded.weights)[0]) for encoded in (chosen, rejected)]
        if not np.array_equal(chosen.ids[: first[0]], rejected.ids[: first[1]]):
            raise BadRowError("the chat template writes the prompt differently before the two answers")
        return chosen, rejected

    def encode_prompt_and(self, row: Row, answer_of: Row) -> Encoded:
        """The prompt of one row with the answer of another: KTO's mismatched completion."""
        if not row.num_answer or not answer_of.num_answer:
            raise BadRowError("the row has no answer that is judged")
        prompt = row.messages[: len(row.messages) - row.num_answer]
        answer = answer_of.messages[len(answer_of.messages) - answer_of.num_answer :]
        return self._conversation((*prompt, *answer), row.tools, len(answer))[0]

    def encode_text(self, text: str) -> Encoded:
        """Plain text: what the tokenizer puts before it (such as BOS), the text, EOS; every token but the first learns.

        Raises:
            BadRowError: the text is empty, or the tokenizer has no EOS.
        """
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise BadRowError("the tokenizer has no end-of-sequence token")
        if not text:
            raise BadRowError("the text is empty")
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        if ids[-1:] != [eos]:
            ids.append(eos)
        weights = np.ones(len(ids), np.float32)
        weights[0] = 0
        return Encoded(np.asarray(ids, np.int32), weights)

    def encode_words(self, row: Row) -> Encoded:
        """Words to classify: `Row.text`, its words one space apart, with a list of as many labels.

        The token that a word begins in has weight 1, which here is the weight of that token's own score (as
        transformers' examples of token classification choose it); all others have 0.

        Raises:
            BadRowError: no text, or not one label a word, or two words begin in one token.
        """
        words = (row.text or "").split(" ")
        if not _is_list(row.label) or len(row.label) != len(words) or not all(words):
            raise BadRowError(f"{len(row.label) if _is_list(row.label) else 'no'} labels for {len(words)} words")
        encoding = self.tokenizer(row.text, return_offsets_mapping=True, verbose=False)
        offsets = np.asarray(encoding["offset_mapping"], np.int64).reshape(-1, 2)
        begins = np.cumsum([0, *(len(word) + 1 for word in words[:-1])])
        holds = (offsets[:, 0] <= begins[:, None]) & (begins[:, None] < offsets[:, 1])  # [words, tokens]
        starts = holds.argmax(axis=1)
        if not holds.any(axis=1).all() or len(set(starts.tolist())) != len(words):
            raise BadRowError("two words begin in one token")
        weights = np.zeros(len(offsets), np.float32)
        weights[starts] = 1
        return Encoded(np.asarray(encoding["input_ids"], np.int32), weights)

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.tokenizer, self.section.thinking, self._now)

    def _classified(self, row: Row) -> Encoded:
        messages, tools = self._prepared(row.messages, row.tools, 0)
        text = self._renderer.text([_clean(message) for message in messages], tools)
        ids, _ = self._tokens(text)
        return Encoded(ids, np.zeros(len(ids), np.float32))

    def _conversation(
        self, given: Sequence[Message], tools: Sequence[dict[str, Any]], num_answer: int, apart: bool = False
    ) -> list[Encoded]:
        """One sequence; or where turns may be learnt `apart`, as many as it takes (see `spans_of`)."""
        messages, tools = self._prepared(given, tools, num_answer)
        clean = [_clean(message) for message in messages]
        everything = self.section.loss_scale == "all" and not num_answer
        learning = [k for k, message in enumerate(messages) if _learns(message, everything)]
        # In several sequences every token would learn several times.
        texts = spans_of(self._renderer, clean, tools, learning, apart and not everything)
        encoded = [self._weighted(found, messages, clean, tools, 1.0 if everything else 0.0) for found in texts]
        encoded = [sequence for sequence in encoded if sequence.weights.any()]
        if not encoded:
            raise BadRowError("no message of the assistant learns")
        return encoded

    def _weighted(
        self,
        found: Spans,
        messages: Sequence[Message],
        clean: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        given: float,
    ) -> Encoded:
        """The tokens of one text; `given` is the weight of what is no turn of the assistant that learns."""
        check_context(clean[: found.num_messages], tools, found.text)
        weights = np.full(len(found.text), given, np.float32)
        for k, (start, end) in found.spans.items():
            self._weigh(messages[k], found.text, start, end, weights)
        ids, offsets = self._tokens(found.text)
        return Encoded(ids, token_weights(found.text, offsets, weights, list(found.spans.values())))

    def _tokens(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = np.asarray(encoding["offset_mapping"], np.int64).reshape(-1, 2)
        return np.asarray(encoding["input_ids"], np.int32), offsets

    def _weigh(self, message: Message, text: str, start: int, end: int, weights: np.ndarray) -> None:
        """Write the weights of one turn's characters into `weights`."""
        loss = message.get("loss")
        if loss is not None:
            weights[start:end] = loss
            return
        weights[start:end] = 1
        token = max((t for t in self._renderer.ends if text.endswith(t, start, end)), key=len, default="")
        stop = end - len(token)
        for first, after, weight in weighted_ranges(LOSS_SCALES[self.section.loss_scale], text[start:stop]):
            weights[start + first : start + after] = weight
        if "parts" not in message:
            return
        at = text.find(message["content"], start, stop)
        if at < 0:
            raise BadRowError("the chat template changes the text of a turn that holds results of tools")
        for part, part_loss in message["parts"]:
            if part_loss is not None:
                weights[at : at + len(part)] = part_loss
            at += len(part)
        if message["parts"][-1][1] is not None:
            weights[stop:end] = message["parts"][-1][1]

    def _prepared(
        self, given: Sequence[Message], tools: Sequence[dict[str, Any]], num_answer: int
    ) -> tuple[list[Message], list[dict[str, Any]]]:
        """Messages as the chat template takes them, each of the assistant's with ``loss``, and the tools left."""
        messages = [_checked(message, k) for k, message in enumerate(given)]
        if not messages:
            raise BadRowError("the row has no messages")
        last_user = max((k for k, m in enumerate(messages) if m["role"] == "user"), default=-1)
        first_of_answer = len(messages) - num_answer if num_answer else 0
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            early = self.section.loss_scale == "last_round" and k < last_user
            message.setdefault("loss", 0.0 if early else None)
            if k < first_of_answer:
                message["loss"] = 0.0
            self._think(message)
        if self.section.system is not None and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": self.section.system})
        if self.section.agent != "none":
            agent = importlib.import_module(f"swift_dist.data.templates.agents.{self.section.agent}")
            return self._without_control(agent.render(messages, tools)), []
        for message in messages:
            if message.get("tool_calls"):
                message["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        if any(message["role"] == "tool" for message in messages) and self._renderer.results_need_name:
            name_results(messages)
        return self._without_control(messages), list(tools)

    def _without_control(self, messages: list[Message]) -> list[Message]:
        """The messages, none of whose texts holds a token that begins or ends turns: as text it would be that token."""
        for k, message in enumerate(messages):
            texts = (message["content"], message.get("reasoning_content"), message.get("tool_calls"))
            found = self._renderer.control.search("\n".join(as_json(text) for text in texts if text))
            if found:
                raise BadRowError(
                    f"message {k + 1} holds {found.group()}, which orders conversations and would not be text there"
                )
        return messages

    def _think(self, message: Message) -> None:
        """Drop an answer's thinking, or put it where the template looks for it."""
        if self.section.thinking == "drop":
            message.pop("reasoning_content", None)
            text = _THINKING.sub("", message["content"])
            text = text.split("</think>")[-1].lstrip() if "</think>" in text else text  # a prompt opened that thinking
            if message["content"].strip() and not text.strip() and not message.get("tool_calls"):
                raise BadRowError("an answer is nothing but thinking")
            message["content"] = text
            return
        renderer = self._renderer
        if renderer.quirk and renderer.quirk.answer:
            return
        if renderer.reads_thinking and not renderer.splits_thinking:
            reasoning, message["content"] = split_thinking(message)
            message |= {"reasoning_content": reasoning} if reasoning else {}
        elif message.get("reasoning_content") and not renderer.reads_thinking:
            message["content"] = f"<think>\n{message.pop('reasoning_content')}\n</think>\n\n{message['content']}"

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        """A call as the template takes it: its arguments an object, or JSON text for templates that only join text."""
        function, arguments = call["function"], call["function"]["arguments"]
        if self._renderer.arguments_as_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": arguments}}


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _make(tokenizer: Any, section: TemplateSection, name: str) -> Template:
    return Template(tokenizer, section, name=name)


def _clean(message: Message) -> Message:
    """A message without what is only ours."""
    return {key: value for key, value in message.items() if key not in ("loss", "parts")}


def _learns(message: Message, everything: bool) -> bool:
    """Whether a turn's span must be known: some of it has a weight that is not the rest's."""
    if message["role"] != "assistant":
        return False
    losses = [loss for _, loss in message["parts"]] if "parts" in message else [message["loss"]]
    if everything:
        return any(loss is not None for loss in losses)
    return any(loss != 0 for loss in losses)


def _checked(message: Message, k: int) -> Message:
    """A copy of a row's message with text as content, calls in OpenAI's form and ``loss`` a number."""
    message = dict(message)
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise BadRowError(f"message {k + 1}: unknown role {role!r}")
    if content is not None and not isinstance(content, str):
        raise BadRowError(f"message {k + 1}: the content is not text")
    message["content"] = content or ""
    loss = message.pop("loss", None)
    if loss is not None:
        if not isinstance(loss, int | float) or not math.isfinite(loss) or loss < 0:
            raise BadRowError(f"message {k + 1}: loss {loss!r} is not a number from 0 on")
        if role != "assistant" and loss:
            raise BadRowError(f"message {k + 1}: only the assistant's messages learn, this is the {role}'s")
        if role == "assistant":
            message["loss"] = float(loss)
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
        return message
    message["tool_calls"] = [_openai_call(call, k) for call in message["tool_calls"]]
    return message


def _openai_call(call: Any, k: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else {}
    if not function.get("name"):
        raise BadRowError(f"message {k + 1}: a call of a tool without its name")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise BadRowError(f"message {k + 1}: the arguments of {function['name']} are not JSON") from None
    wrapper = {key: value for key, value in call.items() if key != "function"} if "function" in call else {}
    return {"type": "function", **wrapper, "function": {"name": function["name"], "arguments": arguments or {}}}
