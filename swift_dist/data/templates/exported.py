"""The chat template of what a run exports: whoever serves it formats conversations as the run's own template did.

``template.system``, ``template.agent`` and ``template.thinking`` change what a model is taught, and no server knows
them. Jinja before the model's own chat template does the same, in a comment of which stands what was written.
"""

from __future__ import annotations

import json
import re
from typing import Any

from swift_dist.config.finetune import TemplateSection
from swift_dist.data.templates.agents._jinja import agent_template

_NOTE = re.compile(r"\{#- swift_dist: agent=(\w+) thinking=(\w+) -#\}")
# Engines look for "developer", in quotes, in a template's text to see whether it knows that role: this does not say so.
_SYSTEM = """\
{%- if not messages or messages[0].role not in "system developer".split() -%}
{%- set messages = [{"role": "system", "content": SYSTEM}] + messages -%}
{%- endif %}
"""
_WITHOUT_THINKING = """\
{%- if enable_thinking is not defined -%}{%- set enable_thinking = false -%}{%- endif %}
"""


def as_trained(template: str, section: TemplateSection) -> str:
    """A chat template that does by itself what training did around it.

    A request's own system message, and its own ``enable_thinking``, count more, as a row's own system message did.

    Args:
        template: Jinja, of the model that was trained.
        section: the job's.

    Returns:
        `template` itself where the section changes no prompt, or it was written for the same one before.
    """
    begin = ""
    if section.thinking == "drop" and "enable_thinking" in template:
        begin += _WITHOUT_THINKING
    if section.system is not None:
        begin += _SYSTEM.replace("SYSTEM", json.dumps(section.system, ensure_ascii=False))
    if not begin and section.agent == "none":
        return template
    begin = f"{{#- swift_dist: agent={section.agent} thinking={section.thinking} -#}}\n{begin}"
    if template.startswith(begin):
        return template
    return begin + (template if section.agent == "none" else agent_template(section.agent, template))


def agent_of(template: str) -> str | None:
    """The agent format that `as_trained` wrote into a template; None: there is none."""
    return next((agent for agent, _ in _NOTE.findall(template) if agent != "none"), None)


def drops_thinking(template: str) -> bool:
    """Whether `as_trained` wrote that the model is asked for answers without thinking."""
    return any(thinking == "drop" for _, thinking in _NOTE.findall(template)) and "enable_thinking" in template


def exported_tokenizer(tokenizer: Any, section: TemplateSection) -> Any:
    """`tokenizer` with its chat template (or each of several) `as_trained`."""
    given = tokenizer.chat_template
    if isinstance(given, dict):
        tokenizer.chat_template = {name: as_trained(one, section) for name, one in given.items()}
    elif given:
        tokenizer.chat_template = as_trained(given, section)
    return tokenizer
