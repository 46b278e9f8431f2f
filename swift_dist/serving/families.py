"""How a model calls tools and thinks, told by its chat template: names of parsers, which are vLLM's too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from swift_dist.data.templates.exported import agent_of
from swift_dist.errors import JobError
from swift_dist.plugins import UnknownPlugin, find, names
from swift_dist.serving import reasoning
from swift_dist.serving.agents import FORMATS, TOOL_PARSERS
from swift_dist.serving.options import EngineOptions

ROOM = "swift_dist.serving.tool_parsers"

# A template is of the first row whose texts all occur in it.
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("qwen3_coder", ("<tool_call>", "<function=")),
    ("glm45", ("<tool_call>", "<arg_key>")),
    ("hermes", ("<tool_call>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("deepseek_v3", ("<｜tool▁calls▁begin｜>", "```json")),
    ("deepseek_v31", ("<｜tool▁calls▁begin｜>",)),
    ("pythonic", ("<|python_start|>",)),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("seed_oss", ("<seed:tool_call>",)),
    ("phi4_mini_json", ("functools[",)),
    ("openai", ("<|channel|>", "<|call|>")),
    ("gemma4", ("<|tool_call>",)),
    ("functiongemma", ("<start_function_call>",)),
    ("granite", ("<|tool_call|>",)),
    ("llama3_json", ('"parameters": dictionary of argument name and its value',)),
)


def template_of(folder: str, options: EngineOptions) -> str:
    """The chat template that a model's folder is served with; "" where there is none.

    Raises:
        JobError: --chat_template names no file that can be read.
    """
    if options.chat_template:
        return given_template(options.chat_template)
    own = Path(folder) / "chat_template.jinja"
    if own.is_file():
        return own.read_text()
    files = (Path(folder) / name for name in ("chat_template.json", "tokenizer_config.json"))
    found = (json.loads(file.read_text()).get("chat_template") for file in files if file.is_file())
    template: Any = next(filter(None, found), None)
    if isinstance(template, list):  # some models have one for tools beside the default
        return "\n".join(str(one.get("template", "")) for one in template)
    return template or ""


def given_template(file: str) -> str:
    """The text of --chat_template. Raises JobError where it cannot be read."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise JobError(
            "chat_template", f"no file to read at {file}: {reason}", "give the path of a Jinja chat template"
        ) from None


def tool_parser_of(options: EngineOptions, template: str) -> str | None:
    """Which of `tool_parsers` reads a model's calls; None where neither options nor template tell."""
    if options.tool_call_parser:
        return options.tool_call_parser
    if options.agent_format:
        return TOOL_PARSERS[options.agent_format]
    trained = agent_of(template)
    if trained:
        return TOOL_PARSERS[trained]
    return next((name for name, signs in _SIGNS if all(sign in template for sign in signs)), None)


def reasoning_tags_of(options: EngineOptions, template: str) -> tuple[str, str] | None:
    """The tags around a model's thinking; None where neither options nor template tell."""
    if options.reasoning_parser:
        return reasoning.PARSERS[options.reasoning_parser]
    if tool_parser_of(options, template) == "openai":  # reads what the splitter of these tags passes on
        return reasoning.HARMONY
    return reasoning.tags_of(template)


def check_parsers(options: EngineOptions) -> None:
    """Refuse names that are none, and files that are not there.

    Raises:
        JobError: with what was probably meant.
    """
    if options.tool_call_parser:
        try:
            find(ROOM, options.tool_call_parser, "PARSER")
        except UnknownPlugin as error:
            raise JobError("tool_call_parser", str(error), f"one of {', '.join(names(ROOM))}") from None
    for key, given, known in (
        ("reasoning_parser", options.reasoning_parser, tuple(reasoning.PARSERS)),
        ("agent_format", options.agent_format, FORMATS),
    ):
        if given and given not in known:
            wrong = UnknownPlugin(key, given, known)
            meant = f" (did you mean {' or '.join(wrong.suggestions)}?)" if wrong.suggestions else ""
            raise JobError(key, f"{given!r} is not known to this engine{meant}", f"one of {', '.join(known)}")
    if options.agent_format and options.tool_call_parser not in (None, TOOL_PARSERS[options.agent_format]):
        raise JobError(
            "tool_call_parser",
            f"{options.tool_call_parser} does not read what agent_format {options.agent_format} writes",
            "leave tool_call_parser out",
        )
    if options.chat_template:
        given_template(options.chat_template)
