"""FunctionGemma: ``<start_function_call>call:name{city:<escape>Bonn<escape>}<end_function_call>``, as Gemma 4 after it.

Generation stops where the result of the tool would stand.
"""

from __future__ import annotations

from swift_dist.serving.tool_parsers.base import Schemas, ToolParser
from swift_dist.serving.tool_parsers.gemma4 import GemmaCalls


def PARSER(schemas: Schemas) -> ToolParser:
    return GemmaCalls("<start_function_call>", "<end_function_call>", "<escape>", "<start_function_response>", schemas)
