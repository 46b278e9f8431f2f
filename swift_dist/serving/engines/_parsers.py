"""vLLM's parsers of calls and of thinking, by what a model's chat template makes it write."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

from swift_dist.data.templates.exported import drops_thinking
from swift_dist.errors import JobError
from swift_dist.plugins import UnknownPlugin
from swift_dist.serving.families import tool_parser_of
from swift_dist.serving.options import EngineOptions

# Those that `families` has no counterpart of. The first whose texts all stand in the template.
_TOOL_PARSERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<｜DSML｜",), "deepseek_v32"),
    (("<|action_start|>",), "internlm"),
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
    ("gemma4", "<channel|>", "gemma4"),
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
    if drops_thinking(template):  # vLLM's parsers would take such an answer, which has no tags, for thinking
        return None
    return next(
        (name for family, tag, name in _REASONING_PARSERS if model_type.startswith(family) and tag in template), None
    )


def check_names(options: EngineOptions) -> None:
    """Refuse parsers that the installed vLLM does not have.

    Raises:
        JobError: with what was probably meant.
    """
    words = [word.replace("_", "-") for word in options.engine_args]
    for key, name, module, plugin in (
        ("tool_call_parser", options.tool_call_parser, "tool_parsers", "--tool-parser-plugin"),
        ("reasoning_parser", options.reasoning_parser, "reasoning", "--reasoning-parser-plugin"),
    ):
        known = _names_in_vllm(module)
        if name and known and name not in known and not any(word.startswith(plugin) for word in words):
            meant = UnknownPlugin(key, name, known).suggestions
            problem = f"vLLM has none called {name!r}" + (f" (did you mean {' or '.join(meant)}?)" if meant else "")
            raise JobError(key, problem, f"Use one of {', '.join(known)}.")


def _names_in_vllm(module: str) -> tuple[str, ...]:
    """Those that vLLM registers, read from its file, because importing it takes seconds; () where it has no such."""
    found = importlib.util.find_spec("vllm")
    for folder in (found and found.submodule_search_locations) or ():
        file = Path(folder) / module / "__init__.py"
        for node in ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else ():
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                return tuple(sorted(str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)))
    return ()
