"""vLLM's parsers of calls and of thinking, by what a model's chat template makes it write."""

from __future__ import annotations

from swift_dist.serving.families import tool_parser_of
from swift_dist.serving.options import EngineOptions

# Those that `families` has no counterpart of. The first whose texts all stand in the template.
_TOOL_PARSERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<|channel|>", "<|call|>"), "openai"),
    (("<｜DSML｜",), "deepseek_v32"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    (("<minimax:tool_call>",), "minimax_m2"),
    (("<seed:tool_call>",), "seed_oss"),
    (("<|action_start|>",), "internlm"),
    (("functools[",), "phi4_mini_json"),
    (("<|tool_call|>",), "granite"),
)
# model_type begins with, the template holds -> parser. These parsers go by the answer alone and differ in what they
# make of one without tags, so a family that is not here is not guessed: its thinking stays in the text.
_REASONING_PARSERS: tuple[tuple[str, str, str], ...] = (
    ("qwen", "<think>", "qwen3"),
    ("glm4", "<think>", "glm45"),
    ("olmo3", "<think>", "olmo3"),
    ("minimax", "<think>", "minimax_m2"),
    ("step3", "<think>", "step3"),
    ("kimi", "<think>", "kimi_k2"),
    ("gpt_oss", "<|channel|>", "openai_gptoss"),
    ("mistral", "[THINK]", "mistral"),
    ("seed_oss", "<seed:think>", "seed_oss"),
)


def tool_parser(options: EngineOptions, template: str) -> str | None:
    """How calls are read from what is written after `template`; None where it teaches none."""
    known = tool_parser_of(options, template)
    return known or next((name for texts, name in _TOOL_PARSERS if all(text in template for text in texts)), None)


def reasoning_parser(options: EngineOptions, template: str, model_type: str) -> str | None:
    """How thinking is told from the answer; None where the template knows none, or the family is not known."""
    if options.reasoning_parser is not None:
        return options.reasoning_parser
    return next(
        (name for family, tag, name in _REASONING_PARSERS if model_type.startswith(family) and tag in template), None
    )
