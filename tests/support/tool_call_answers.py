"""Answers that call tools, in every family's notation, with what they call."""

from __future__ import annotations

import json

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "units": {"type": "array"}},
}
SCHEMAS = {"weather": WEATHER, "now": {"type": "object", "properties": {}}}
ARGUMENTS = {"city": 'Köln "am" {Rhein}', "days": 3, "units": ["°C"]}
WRITTEN = json.dumps(ARGUMENTS, ensure_ascii=False)
BOTH = [("weather", ARGUMENTS), ("now", {})]

# parser -> (answer, the text before its calls, its calls)
ANSWERS = {
    "hermes": (
        f'Let me see.\n<tool_call>\n{{"name": "weather", "arguments": {WRITTEN}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "Let me see.",
        BOTH,
    ),
    "mistral": (
        f'[TOOL_CALLS][{{"name": "weather", "arguments": {WRITTEN}}}, {{"name": "now", "arguments": {{}}}}]',
        "",
        BOTH,
    ),
    "mistral v11": (f"So:[TOOL_CALLS]weather[CALL_ID]abc[ARGS]{WRITTEN}[TOOL_CALLS]now[ARGS]{{}}", "So:", BOTH),
    "llama3_json": (
        f'<|python_tag|>{{"name": "weather", "parameters": {WRITTEN}}}; {{"name": "now", "parameters": {{}}}}',
        "",
        BOTH,
    ),
    "pythonic": ('[weather(city=\'Köln "am" {Rhein}\', days=3, units=["°C"]), now()]', "", BOTH),
    "deepseek_v3": (
        "Ok.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        f"{WRITTEN}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{{}}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "Ok.",
        BOTH,
    ),
    "deepseek_v31": (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{WRITTEN}<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        BOTH,
    ),
    "qwen3_coder": (
        "I look.\n\n<tool_call>\n<function=weather>\n<parameter=city>\n" + ARGUMENTS["city"] + "\n</parameter>\n"
        '<parameter=days>\n3\n</parameter>\n<parameter=units>\n["°C"]\n</parameter>\n</function>\n</tool_call>\n'
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "I look.",
        BOTH,
    ),
    "glm45": (
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>" + ARGUMENTS["city"] + "</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n"
        '<arg_key>units</arg_key>\n<arg_value>["°C"]</arg_value>\n</tool_call><tool_call>now\n</tool_call>',
        "",
        BOTH,
    ),
    "kimi_k2": (
        "Ok.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        f"{WRITTEN}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{{}}"
        "<|tool_call_end|><|tool_calls_section_end|>",
        "Ok.",
        BOTH,
    ),
    "minimax_m2": (
        'So.\n<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">'
        + ARGUMENTS["city"]
        + "</parameter>\n"
        '<parameter name="days">3</parameter>\n<parameter name="units">["°C"]</parameter>\n</invoke>\n'
        '<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        "So.",
        BOTH,
    ),
    "seed_oss": (
        "<seed:tool_call>\n<function=weather>\n<parameter=city>\n" + ARGUMENTS["city"] + "\n</parameter>\n"
        '<parameter=days>\n3\n</parameter>\n<parameter=units>\n["°C"]\n</parameter>\n</function>\n</seed:tool_call>\n'
        "<seed:tool_call>\n<function=now>\n</function>\n</seed:tool_call>",
        "",
        BOTH,
    ),
    "granite": (
        f'<|tool_call|>[{{"name": "weather", "arguments": {WRITTEN}}}, {{"name": "now", "arguments": {{}}}}]',
        "",
        BOTH,
    ),
    "phi4_mini_json": (
        # without a list in it, at whose end vLLM's would stop to read
        'functools[{"name": "weather", "arguments": {"city": "Köln", "days": 3}}, {"name": "now", "arguments": {}}]',
        "",
        [("weather", {"city": "Köln", "days": 3}), ("now", {})],
    ),
    "openai": (
        # as `HarmonySplitter` passes it on
        f"Ok.<|channel|>commentary to=functions.weather<|message|>{WRITTEN}<|call|>"
        "<|channel|>commentary to=functions.now<|message|>{}<|call|>",
        "Ok.",
        BOTH,
    ),
    "gemma4": (
        'Ok.\n<|tool_call>call:weather{city:<|"|>'
        + ARGUMENTS["city"]
        + '<|"|>,days:3,units:[<|"|>°C<|"|>]}<tool_call|>'
        "<|tool_call>call:now{}<tool_call|>",
        "Ok.",
        BOTH,
    ),
    "functiongemma": (
        # numbers and lists as texts, because vLLM's reads nothing else
        "<start_function_call>call:weather{city:<escape>" + ARGUMENTS["city"] + "<escape>,days:<escape>3<escape>,"
        'units:<escape>["°C"]<escape>}<end_function_call><start_function_call>call:now{}<end_function_call>',
        "",
        BOTH,
    ),
    "functiongemma as its template": (
        "<start_function_call>call:weather{city:<escape>" + ARGUMENTS["city"] + "<escape>,days:3,"
        "units:[<escape>°C<escape>]}<end_function_call><start_function_call>call:now{}<end_function_call>",
        "",
        BOTH,
    ),
    "react": (
        f"Thought: I need both.\nAction: weather\nAction Input: {WRITTEN}\nAction: now\nAction Input: {{}}\n",
        "Thought: I need both.",
        BOTH,
    ),
    "qwen_agent": (f"✿FUNCTION✿: weather\n✿ARGS✿: {WRITTEN}\n✿FUNCTION✿: now\n✿ARGS✿: {{}}\n", "", BOTH),
}
