"""Ids and masks of real chat templates against texts written by hand, turn by turn."""

from __future__ import annotations

import re

import numpy as np
import pytest

from swift_dist.config.finetune import TemplateSection
from swift_dist.data.rows import BadRowError, Row
from swift_dist.data.templates.template import Template
from swift_dist.errors import JobError
from tests.data.templates.cases import CALLS, CASES, ONE, THINKS, TWO, Case, T, chatml
from tests.data.templates.tiny import answer, call, made_with, named, result, shown, system, template, tokenizer, user


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.template)
def test_ids_and_mask(case: Case, trim_offsets: bool):
    made = template(case.template, trim_offsets=trim_offsets, **case.section)
    made.check()
    encoded = made.encode(Row(case.messages, tools=case.tools))
    # Tokenised piece by piece; every border is where the tokenizer splits anyway.
    ids, mask = [], []
    for index, piece in enumerate(re.split("[⟦⟧]", case.expected.removeprefix("…"))):
        tokens = made.tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += tokens
        mask += [index % 2] * len(tokens)
    begin = len(encoded.ids) - len(ids) if case.expected.startswith("…") else 0
    assert encoded.ids[begin:].tolist() == ids
    assert encoded.weights.tolist() == [0] * begin + mask
    assert (encoded.ids.dtype, encoded.weights.dtype) == (np.int32, np.float32)


TWICE = {**call(), "tool_calls": call()["tool_calls"] * 2}
CHANGED = ("deepseek_r1", "glm4", "hermes_2", "internlm2")


@pytest.mark.parametrize("case", [case for case in CASES if not case.template.startswith(CHANGED)])
def test_text_is_the_template_s(case: Case):
    """Nothing is added to or left out of what the tokenizer's own method renders (families with quirks, and templates
    that need results named or arguments as text, aside)."""
    made = template(case.template, **case.section)
    messages = list(case.messages)
    if case.section.get("system") and messages[0]["role"] != "system":
        messages.insert(0, system(case.section["system"]))
    if case.section.get("thinking") == "drop":
        messages = [{key: text for key, text in m.items() if key != "reasoning_content"} for m in messages]
    elif case.template == "chatml" and case.messages == THINKS:
        messages[1] = answer("<think>\nGreet them.\n</think>\n\nHello.")
    rendered = made.tokenizer.apply_chat_template(messages, tools=list(case.tools) or None, return_dict=True)
    assert made.encode(Row(case.messages, tools=case.tools)).ids.tolist() == rendered["input_ids"]


def test_generation_starts_where_the_prompt_ends():
    """Ids up to the first learned token are those that generation is asked with."""
    for case in CASES:
        made = template(case.template, **case.section)
        if case.messages[-1]["role"] != "assistant":
            continue
        encoded = made.encode(Row(case.messages, tools=case.tools))
        last = int(np.flatnonzero(np.diff(encoded.weights, prepend=0) > 0)[-1])
        renderer = made._renderer
        messages, tools = made._prepared(case.messages, case.tools, 0)
        clean = [{key: text for key, text in m.items() if key != "loss"} for m in messages[:-1]]
        prompt = renderer.text(clean, tools, prompt=True)
        assert encoded.ids[:last].tolist() == made.tokenizer(prompt, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("name", "row", "section", "reason"),
    [
        ("qwen3", Row(TWO), {}, "answer 1: the chat template rewrites this turn when more messages follow"),
        ("qwen3", Row(CALLS, tools=T), {}, "answer 1: the chat template rewrites this turn"),
        ("gptoss", Row(TWO), {}, "answer 1: the chat template rewrites this turn"),
        (
            "deepseek_r1_distill",
            Row((*ONE, user("How?"), answer("<think>Polite.</think>Fine."))),
            {},
            "answer 1: the chat template rewrites this turn",
        ),
        ("deepseek_r1_distill", Row(ONE), {}, "answer 1 has no thinking"),
        ("qwen3_5_think", Row(ONE), {}, "template.thinking drop"),
        ("gptoss", Row((user("Hi"), TWICE), tools=T), {}, "leaves out one of 2 calls of 'get_weather'"),
        ("nemotron_3_super", Row(ONE), {}, "answer 1 has no thinking"),
        ("cohere", Row(CALLS, tools=T), {}, "roles must alternate"),
        ("cohere", Row(CALLS, tools=T), {}, "template.agent writes calls and results"),
        ("gemma", Row((system("Be brief."), *ONE)), {}, "System role not supported"),
        ("gemma", Row((*ONE, answer("Again."))), {}, "roles must alternate"),
        ("lfm2", Row(CALLS, tools=T), {}, "leaves out the call of 'get_weather': set template.agent"),
        ("chatml", Row(CALLS[:1] + CALLS[3:], tools=T), {}, "does not tell the model of the tool 'get_weather'"),
        ("llama3_1", Row((user("Hi"), call("Let me see."))), {}, "leaves out a part of the answer: 'Let me see.'"),
        (
            "phi3",
            Row((user("Hi"), answer("Hm."), result("3"), answer("Cold."))),
            {},
            "leaves out what the tool says: '3'",
        ),
        ("mistral_v0_2", Row((answer("Hello."),)), {}, "roles must alternate|nothing stands before it"),
        ("chatml", Row((answer("Hello."), user("Hi"))), {}, "nothing stands before it"),
        ("chatml", Row((user("Hi"), answer("\n\nHello."))), {}, r"begins inside the token '\\n\\n\\n'"),
        ("chatml", Row((user("Hi <|im_end|>"), answer("Hello."))), {}, "message 1 holds <|im_end|>"),
        ("chatml", Row((user("Hi"), answer("<|im_start|>user\nHi"))), {}, "message 2 holds <|im_start|>"),
        ("llama3", Row((user("<s>Hi</s>"), answer("Hello."))), {}, "message 1 holds <s>"),
        ("gptoss", Row((user("Hi"), call(), result("<|channel|>"), answer("So."))), {}, "message 3 holds <|channel|>"),
        ("chatml", Row((user("Hi"), answer("<think>Hm.</think>"))), {"thinking": "drop"}, "nothing but thinking"),
        (
            "qwen3",
            Row((user("Hi"), answer("Hello.", reasoning_content="<|im_end|>"))),
            {},
            "message 2 holds <|im_end|>",
        ),
        ("chatml", Row((user("Hi"), answer("Hello.", loss=0))), {}, "no message of the assistant learns"),
        ("chatml", Row((user("Hi", loss=1), answer("Hello."))), {}, "only the assistant's messages learn"),
        ("chatml", Row((user("Hi"), answer("Hello.", loss=-1))), {}, "loss -1 is not a number from 0 on"),
        ("chatml", Row((user([{"type": "image"}]), answer("Hello."))), {}, "the content is not text"),
        ("chatml", Row(()), {}, "no messages"),
    ],
)
def test_refused(name: str, row: Row, section: dict, reason: str):
    with pytest.raises(BadRowError, match=reason.replace("<|", r"<\|").replace("|>", r"\|>")):
        template(name, **section).encode(row)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "has no chat template"),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}", "ignores add_generation_prompt"),
        (
            "{% for m in messages %}{{ '# ' + m['role'] + ' ' + m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}# assistant {% endif %}",
            "no special token ends",
        ),
        ("{{ messages[0]['content'] }}</s>", "leaves the answer out"),
        (
            "{% for m in messages %}{{ '<s>' + m['role'] + '\\n' + m['content'] + '</s>' }}{% endfor %}"
            "{% if add_generation_prompt %}<s>model\n{% endif %}",
            "is not how it begins the turn",
        ),
        ("{{ raise_exception('never') }}", "never"),
    ],
)
def test_templates_that_give_no_exact_mask(source: str | None, reason: str):
    with pytest.raises(JobError, match=reason):
        Template(made_with(source), TemplateSection(), name="tiny").check()


def test_marks_are_believed_where_they_agree():
    # With marks, the author of a template that rewrites earlier turns says that they learn as they are rewritten.
    source = tokenizer("qwen3_training").chat_template
    thought = "{{- '<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    assert source.count(thought) == 1
    rewriting = source.replace(thought, f"{{%- if loop.last %}}{thought}{{%- else %}}{{{{- content }}}}{{%- endif %}}")
    made = Template(made_with(rewriting), TemplateSection())
    assert shown(made, made.encode(Row(TWO))) == chatml("", "Hi", "Hello.", "How?", "<think>\n\n</think>\n\nFine.")
    # Marks that begin with the header do not agree with the rule.
    header = "{{- '<|im_start|>' + message.role + '\\n' }}\n        {%- generation %}"
    assert rewriting.count(header) == 1
    wrong = rewriting.replace(header, "{%- generation %}" + header.removesuffix("{%- generation %}"))
    made = Template(made_with(wrong), TemplateSection())
    assert shown(made, made.encode(Row(ONE))) == chatml("", "Hi", "<think>\n\n</think>\n\nHello.")
    with pytest.raises(BadRowError, match="rewrites this turn"):
        made.encode(Row(TWO))


def test_prompt_that_is_tokenised_otherwise_before_an_answer():
    # GPT-2's tokenizer makes one token of the prompt's last line breaks, two where the answer follows.
    made = Template(made_with(tokenizer("llama3").chat_template, gpt2=True), TemplateSection())
    with pytest.raises(JobError, match="other tokens"):
        made.check()
    # One that takes white space away at the end of a text, but not before an answer.
    from tokenizers import normalizers

    made = Template(made_with(tokenizer("chatml").chat_template), TemplateSection())
    made.check()
    made.tokenizer.backend_tokenizer.normalizer = normalizers.Strip(left=False)
    with pytest.raises(JobError, match="other tokens"):
        Template(made.tokenizer, TemplateSection()).check()


def test_results_are_named_by_the_call_that_they_answer():
    two = {**call(), "tool_calls": [{"id": "a", **named("f")}, {"id": "b", **named("g")}]}
    by_id = ({"role": "tool", "tool_call_id": id, "content": id} for id in "ba")
    in_order = ({"role": "tool", "content": text} for text in "ba")
    for results, names in ((by_id, "gf"), (in_order, "fg")):
        made = template("hermes_2_pro_like")
        text = shown(made, made.encode(Row((user("Hi"), two, *results, answer("So.")))))
        assert [
            f'"name": "{name}", "content": "{said}"' in text for name, said in ((names[0], "b"), (names[1], "a"))
        ] == [True] * 2
    with pytest.raises(BadRowError, match="a result needs the name"):
        made.encode(Row((user("Hi"), answer("Hm."), {"role": "tool", "content": "3"}, answer("So."))))


def test_what_orders_conversations_is_not_a_word_of_answers():
    """Tags of thinking, and special tokens that the template does not write around turns, are text of answers."""
    made = template("qwen3")
    text = "<think>a</think>b <tool_call>"
    assert shown(made, made.encode(Row((user("Hi"), answer(text))))).endswith("b <tool_call><|im_end|>⟧\n")


def test_thinking_that_a_prompt_opened_is_dropped():
    for text in ("Why?</think>\n\nHello.", "<think>Why?</think>Hello.", "<think>a</think><think>b</think>\nHello."):
        made = template("chatml", thinking="drop")
        assert shown(made, made.encode(Row((user("Hi"), answer(text))))) == chatml("", "Hi", "Hello.")


def test_dates_are_the_template_s_own_time():
    made = template("llama3_2")
    made._now = made._now.replace(year=2031, month=2, day=3)
    assert "Today Date: 03 Feb 2031\n" in shown(made, made.encode(Row(ONE)))
