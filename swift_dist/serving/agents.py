"""Tools for models whose chat template does not know them: the formats of ``template.agent``, and what reads calls.

A format is written into the model's chat template (`agent_template`): where the engine is asked for it, or where a run
that was trained with one exported its model (`swift_dist.data.templates.exported`).
"""

from __future__ import annotations

from swift_dist.data.templates.agents._jinja import agent_template

__all__ = ["FORMATS", "NOT_VLLMS", "TOOL_PARSERS", "agent_template"]

# format -> how its calls are read (tool_parsers/)
TOOL_PARSERS = {"react": "react", "toolbench": "react", "hermes": "hermes", "qwen": "qwen_agent"}
FORMATS = tuple(TOOL_PARSERS)
NOT_VLLMS = ("react", "qwen_agent")  # parsers that vllm_agents.py adds to vLLM's own
