"""What ``template.agent: react`` and ``toolbench`` teach: ``Action:`` and ``Action Input:``, once a call.

Generation stops where the result of the tool would stand. What was thought before the first call is the answer's text.
"""

from __future__ import annotations

from swift_dist.serving.tool_parsers.base import LabelledCalls, Schemas, ToolParser


def PARSER(schemas: Schemas) -> ToolParser:
    return LabelledCalls("Action:", "Action Input:", ("Observation:",), schemas)
