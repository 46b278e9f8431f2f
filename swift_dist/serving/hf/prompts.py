"""Conversations as token ids, by the model's chat template."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from swift_dist.serving.agents import agent_template
from swift_dist.serving.hf.failures import bad_request
from swift_dist.serving.hf.protocol import ChatRequest, Message, OtherPart, Tokenize, Tool
from swift_dist.serving.options import EngineOptions
from swift_dist.serving.reasoning import HARMONY, tags_of

# Arguments of apply_chat_template that chat_template_kwargs may not reach: they are no variables of the template.
_RESERVED = {"tokenize", "chat_template", "conversation", "tools", "documents", "return_tensors", "return_dict"} | {
    *("padding", "truncation", "max_length", "tokenizer_kwargs", "return_assistant_tokens_mask", "messages"),
    *("add_generation_prompt", "continue_final_message", "strict", "processor_kwargs", "load_audio_from_video"),
}


@dataclass(frozen=True)
class Rendered:
    """A prompt, as text and as token ids."""

    text: str
    ids: list[int]


class ChatPrompts:
    """Renders conversations.

    Args:
        tokenizer: transformers'.
        options: ``chat_template`` and ``agent_format`` of the engine.
        name: of the model, for messages.
    """

    def __init__(self, tokenizer: Any, options: EngineOptions, name: str) -> None:
        self._tokenizer, self._name = tokenizer, name
        template = Path(options.chat_template).read_text() if options.chat_template else tokenizer.chat_template
        if options.agent_format and template:
            one = template if isinstance(template, str) else template.get("default", next(iter(template.values())))
            template = agent_template(options.agent_format, one)
        if template:
            tokenizer.chat_template = template
        self.template: str = template if isinstance(template, str) else "\n".join((template or {}).values())

    def render(self, request: ChatRequest | Tokenize, tools: list[Tool]) -> Rendered:
        """The prompt of a conversation.

        Raises:
            RequestError: there is no chat template, or it refuses the conversation.
        """
        if not self.template:
            raise bad_request(
                f"The model {self._name!r} has no chat template: it takes /v1/completions, or is served with "
                "--chat_template FILE",
                "messages",
            )
        messages = [self._plain(message, place) for place, message in enumerate(request.messages or ())]
        variables = dict(request.chat_template_kwargs or {})
        wrong = sorted(_RESERVED & set(variables))
        if wrong:
            raise bad_request(f"{wrong[0]} is no variable of a chat template", "chat_template_kwargs")
        effort = getattr(request, "reasoning_effort", None)
        if effort is not None:
            variables = {"reasoning_effort": effort, "enable_thinking": effort != "none", **variables}
        going_on = getattr(request, "continue_final_message", False)
        prompt = request.add_generation_prompt if request.add_generation_prompt is not None else not going_on
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=[tool.model_dump(exclude_unset=True) for tool in tools] or None,
                add_generation_prompt=prompt and not going_on,
                continue_final_message=going_on,
                tokenize=False,
                **variables,
            )
        except Exception as error:  # templates are programs of others: raise_exception, and whatever goes wrong in them
            raise bad_request(f"The chat template refuses the conversation: {error}", "messages") from None
        return Rendered(text, self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _plain(self, message: Message, place: int) -> dict[str, Any]:
        """A message as chat templates take it."""
        # Templates skip roles that they do not know, and what the developer says would be lost (vLLM does the same).
        unknown = message.role == "developer" and not re.search("""["']developer["']""", self.template)
        plain: dict[str, Any] = {"role": "system" if unknown else message.role, "content": _text(message, place)}
        if message.name is not None:
            plain["name"] = message.name
        if message.tool_call_id is not None:
            plain["tool_call_id"] = message.tool_call_id
        thought = message.reasoning_content or message.reasoning
        if thought:
            plain["reasoning_content"] = thought
            if "message.thinking" in self.template:  # gpt-oss has a name of its own for it
                plain["thinking"] = thought
                if message.tool_calls and plain["content"] and tags_of(self.template) == HARMONY:
                    # whose template refuses both beside a call, and writes either as thinking
                    plain |= {"thinking": f"{thought}\n{plain['content']}", "content": ""}
        if message.tool_calls:
            plain["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
                for call in message.tool_calls
                for arguments in [self._arguments(call.function.arguments, place)]
            ]
        return plain

    def _arguments(self, written: str, place: int) -> Any:
        try:
            arguments = json.loads(written or "{}")
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise bad_request("the arguments of a call are the JSON text of an object", f"messages.{place}.tool_calls")
        return written if self._renderer.arguments_as_text else arguments

    @cached_property
    def _renderer(self) -> Any:
        from swift_dist.data.templates.renderer import Renderer

        return Renderer(self._tokenizer, "keep", datetime.now())


def _text(message: Message, place: int) -> str:
    """The text of a message's content: its parts a line each, as vLLM joins them."""
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    for part in message.content:
        if isinstance(part, OtherPart):
            raise bad_request(f"this model takes text only, not {part.type}", f"messages.{place}.content")
    return "\n".join(part.text for part in message.content if not isinstance(part, OtherPart))
