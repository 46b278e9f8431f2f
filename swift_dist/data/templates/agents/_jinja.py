"""Tools for models whose chat template does not know them: the formats of ``template.agent``, as chat templates.

An engine renders Jinja, so a format is a beginning and an end around the model's own chat template. The beginning
writes tools, calls and results into the messages as `swift_dist.data.templates.agents` does for training; where the
last message is a result that stands inside the assistant's turn, the end writes that turn's beginning behind the
generation prompt, for the model to go on with. The same text serves every engine that takes ``--chat_template``.
"""

from __future__ import annotations

import json
import re

from swift_dist.data.templates.agents import hermes, qwen, react, toolbench

_BEGIN = """\
{%- set agent = namespace(out=[], open=none, results=[], tail="", functions=[], system="", rest=[]) -%}
{%- for tool in (tools or []) -%}
{%- set agent.functions = agent.functions + [tool.function if tool.function is defined else tool] -%}
{%- endfor -%}
"""

_HERMES = """\
{%- for message in messages -%}
{%- if message.role == "tool" -%}
{%- set agent.results = agent.results + ["<tool_response>\\n" + message.content + "\\n</tool_response>"] -%}
{%- else -%}
{%- if agent.results -%}
{%- set agent.out = agent.out + [{"role": "user", "content": agent.results | join("\\n")}] -%}
{%- set agent.results = [] -%}
{%- endif -%}
{%- if message.tool_calls -%}
{%- set written = namespace(lines=[message.content] if message.content else []) -%}
{%- for call in message.tool_calls -%}
{%- set arguments = call.function.arguments -%}
{%- set arguments = arguments if arguments is string else arguments | tojson -%}
{%- set written.lines = written.lines + ['<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' \
+ arguments + '}\\n</tool_call>'] -%}
{%- endfor -%}
{%- set agent.out = agent.out + [{"role": "assistant", "content": written.lines | join("\\n")}] -%}
{%- else -%}
{%- set agent.out = agent.out + [message] -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if agent.results -%}
{%- set agent.out = agent.out + [{"role": "user", "content": agent.results | join("\\n")}] -%}
{%- endif -%}
"""

# As agents._turns.in_one_turn: results, and what the assistant says after them, stand in the turn that called.
_IN_ONE_TURN = """\
{%- for message in messages -%}
{%- if message.role == "tool" -%}
{%- if agent.open is none -%}{{- raise_exception("a result of a tool follows no call of one") -}}{%- endif -%}
{%- set agent.results = agent.results + [" " + message.content | trim + "\\n"] -%}
{%- else -%}
{%- if agent.results -%}
{%- set agent.open = agent.open + agent.results | join(BETWEEN) + AFTER -%}
{%- endif -%}
{%- if message.role == "assistant" -%}
{%- set written = namespace(text=(message.content or "") | trim) -%}
{%- if message.tool_calls -%}
{%- set written.text = written.text + "\\n" if written.text else "" -%}
{%- for call in message.tool_calls -%}
{%- set arguments = call.function.arguments -%}
{%- set arguments = arguments if arguments is string else arguments | tojson -%}
{%- set written.text = written.text + NAME + call.function.name + ARGUMENTS + arguments + "\\n" -%}
{%- endfor -%}
{%- set written.text = written.text + RESULT -%}
{%- endif -%}
{%- if agent.results -%}
{%- set written.text = agent.open + REPLY + written.text -%}
{%- elif agent.open is not none -%}
{%- set agent.out = agent.out + [{"role": "assistant", "content": agent.open}] -%}
{%- endif -%}
{%- set agent.open = none -%}
{%- if message.tool_calls -%}
{%- set agent.open = written.text -%}
{%- else -%}
{%- set agent.out = agent.out + [{"role": "assistant", "content": written.text}] -%}
{%- endif -%}
{%- else -%}
{%- if agent.open is not none -%}
{%- set agent.out = agent.out + [{"role": "assistant", "content": agent.open}] -%}
{%- endif -%}
{%- set agent.open = none -%}
{%- set agent.out = agent.out + [message] -%}
{%- endif -%}
{%- set agent.results = [] -%}
{%- endif -%}
{%- endfor -%}
{%- if agent.results -%}
{%- set agent.tail = agent.open + agent.results | join(BETWEEN) + AFTER -%}
{%- elif agent.open is not none -%}
{%- set agent.out = agent.out + [{"role": "assistant", "content": agent.open}] -%}
{%- endif -%}
"""

_END = """\
{%- if agent.functions -%}
{%- set agent.rest = agent.out -%}
{%- if agent.out and agent.out[0].role == "system" -%}
{%- set agent.system = agent.out[0].content -%}
{%- set agent.rest = agent.out[1:] -%}
{%- endif -%}
{%- set agent.system = agent.system + "\\n\\n" + PROMPT if agent.system else PROMPT -%}
{%- set agent.out = [{"role": "system", "content": agent.system}] + agent.rest -%}
{%- endif -%}
{%- set messages = agent.out -%}
{%- set tools = none -%}
{%- if agent.tail -%}{%- set add_generation_prompt = true -%}{%- endif -%}
{%- set TAIL = agent.tail -%}
{{- "" }}"""

_NAMES = 'agent.functions | map(attribute="name") | join(",")'
_EACH = "{%- for tool in agent.functions -%}{%- set described.lines = described.lines + [LINE] -%}{%- endfor -%}"
_QWEN_LINE = (
    '"### " + (tool.name_for_human or tool.name) + "\\n\\n" + tool.name + ": " + (tool.description or "") '
    '+ " Parameters: " + (tool.parameters or {}) | tojson + " Format the arguments as a JSON object."'
)


def agent_template(name: str, template: str) -> str:
    """A chat template that knows tools.

    Args:
        name: of one of the formats, ``react``, ``toolbench``, ``hermes`` or ``qwen``.
        template: the model's own Jinja chat template; what it would do with tools itself is switched off.
    """
    if name == "hermes":
        turns = _HERMES
        prompt = _described('{"type": "function", "function": tool} | tojson', "\n", hermes.PROMPT)
    elif name == "qwen":
        labels = ("✿FUNCTION✿: ", "\n✿ARGS✿: ", "✿RESULT✿:", "✿RESULT✿:", "✿RETURN✿:", " ")
        turns, prompt = _in_one_turn(*labels), _described(_QWEN_LINE, "\n\n", qwen.PROMPT)
    else:
        labels = ("Action: ", "\nAction Input: ", "Observation:", "Observation:", "", "")
        turns = _in_one_turn(*labels)
        prompt = _described("tool | tojson", "\n\n", react.PROMPT)
        if name == "toolbench":
            prompt = "{%- set agent_prompt = " + json.dumps(toolbench.PROMPT) + " + agent.functions | tojson -%}\n"
    tail = f"agent_tail_{template.count('{%- set agent_tail_')}"  # `template` may hold a format, with a tail of its own
    end = _END.replace("PROMPT", "agent_prompt").replace("TAIL", tail)
    # Jinja drops the newline that a template ends with; here it would not be the end any more.
    return _BEGIN + turns + prompt + end + template.removesuffix("\n") + "{{ " + tail + " }}"


def _in_one_turn(name: str, arguments: str, result: str, between: str, after: str, reply: str) -> str:
    written = _IN_ONE_TURN
    words = ("NAME", "ARGUMENTS", "RESULT", "BETWEEN", "AFTER", "REPLY")
    for word, text in zip(words, (name, arguments, result, between, after, reply), strict=True):
        written = written.replace(word, json.dumps(text))
    return written


def _described(line: str, between: str, prompt: str) -> str:
    """Jinja that sets ``agent_prompt``: the prompt of training with the tools, each as `line`, and their names."""
    known = {"\x01": f"(described.lines | join({json.dumps(between)}))", "\x02": f"({_NAMES})"}
    pieces = re.split("([\x01\x02])", prompt.format(tools="\x01", names="\x02"))
    return (
        "{%- set described = namespace(lines=[]) -%}"
        + _EACH.replace("LINE", line)
        + "{%- set agent_prompt = "
        + " + ".join(known.get(piece, json.dumps(piece)) for piece in pieces)
        + " -%}\n"
    )
