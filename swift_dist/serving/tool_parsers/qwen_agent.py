"""What ``template.agent: qwen`` teaches (Qwen-Agent's format of Qwen 1.5 and 2): signs between flowers."""

from __future__ import annotations

from swift_dist.serving.tool_parsers.base import LabelledCalls, Schemas, ToolParser


def PARSER(schemas: Schemas) -> ToolParser:
    return LabelledCalls("✿FUNCTION✿:", "✿ARGS✿:", ("✿RESULT✿", "✿RETURN✿"), schemas)
