"""The agent formats' calls as vLLM's tool parsers, for ``vllm serve --tool-parser-plugin`` with the path of this file.

Registers ``react`` (which reads toolbench too) and ``qwen_agent``; hermes is a parser of vLLM's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm.entrypoints.chat_utils import make_tool_call_id
from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.tool_parsers.abstract_tool_parser import ToolParser as VllmToolParser
from vllm.tool_parsers.abstract_tool_parser import ToolParserManager

from swift_dist.serving.tool_parsers import qwen_agent, react
from swift_dist.serving.tool_parsers.base import Call, Event, Schemas, ToolParser


class _AgentParser(VllmToolParser):
    """One answer's state: what vLLM asks, answered by a parser of ours."""

    make: Callable[[Schemas], ToolParser]
    engine_based_streaming = True  # has vLLM call finish_streaming at the end, for text that is still held then

    def __init__(self, tokenizer: Any, tools: Any = None) -> None:
        super().__init__(tokenizer, tools)
        self._stream = type(self).make({})

    def adjust_request(self, request: Any) -> Any:
        """Have generation stop where the tool's result would stand; forced calls are JSON, in which nothing stops."""
        request = super().adjust_request(request)
        if request.tools and request.tool_choice == "auto":
            own = [request.stop] if isinstance(request.stop, str) else list(request.stop or ())
            request.stop = [*own, *(stop for stop in self._stream.stop if stop not in own)]
        return request

    def extract_tool_calls(self, model_output: str, request: Any) -> ExtractedToolCallInformation:
        if getattr(request, "tool_choice", None) == "none":
            return ExtractedToolCallInformation(tools_called=False, tool_calls=[], content=model_output)
        parser = type(self).make({})
        events = [*parser.feed(model_output), *parser.finish()]
        content = "".join(event for event in events if isinstance(event, str))
        calls = [
            ToolCall(function=FunctionCall(name=event.name, arguments=event.arguments))
            for event in events
            if isinstance(event, Call)
        ]
        return ExtractedToolCallInformation(tools_called=bool(calls), tool_calls=calls, content=content or None)

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: Any,
    ) -> DeltaMessage | None:
        if request.tool_choice == "none":
            return DeltaMessage(content=delta_text) if delta_text else None
        return self._delta(self._stream.feed(delta_text))

    def finish_streaming(self) -> DeltaMessage | None:
        return self._delta(self._stream.finish())

    def _delta(self, events: list[Event]) -> DeltaMessage | None:
        content = "".join(event for event in events if isinstance(event, str))
        deltas = []
        for event in events:
            if not isinstance(event, Call):
                continue
            # vLLM compares these with what it has sent when the stream ends
            self.current_tool_id += 1
            self.prev_tool_call_arr.append({"name": event.name, "arguments": event.arguments})
            self.streamed_args_for_tool.append(event.arguments)
            function = DeltaFunctionCall(name=event.name, arguments=event.arguments)
            deltas.append(
                DeltaToolCall(index=self.current_tool_id, type="function", id=make_tool_call_id(), function=function)
            )
        return DeltaMessage(content=content or None, tool_calls=deltas) if content or deltas else None


class ReActParser(_AgentParser):
    make = staticmethod(react.PARSER)


class QwenAgentParser(_AgentParser):
    make = staticmethod(qwen_agent.PARSER)


ToolParserManager.register_module("react", module=ReActParser)
ToolParserManager.register_module("qwen_agent", module=QwenAgentParser)
