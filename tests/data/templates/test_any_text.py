"""Any text, several kinds of tokenizers: what learns is what generation would make, or the row is refused."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swift_dist.config.finetune import TemplateSection
from swift_dist.data.rows import BadRowError, Row
from swift_dist.data.templates.template import Template
from tests.data.templates.test_template import _sentencepiece
from tests.data.templates.tiny import answer, made_with, tokenizer, user

PIECES = (
    *(" ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\u200b", "\ufeff", "\x00"),
    *("a", "Hello", "12", "'s", ".", "<", "[/", "]", "|>", "½"),
    *("é", "e\u0301", "\u0301", "ﬁ", "你好", "🙂", "👨‍👩‍👧", "K"),
)
TEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join).filter(str.strip)


@cache
def made(name: str, kind: str) -> Template:
    from tokenizers import normalizers

    source = tokenizer(name).chat_template
    if kind == "sentencepiece":
        return Template(_sentencepiece(source), TemplateSection())
    fast = made_with(source, trim_offsets=kind == "trimmed", gpt2=kind == "gpt2")
    if kind == "nfkc":
        fast.backend_tokenizer.normalizer = normalizers.NFKC()
    return Template(fast, TemplateSection())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("chatml", "words"), ("chatml", "trimmed"), ("chatml", "gpt2"), ("chatml", "nfkc"), ("llama3", "words")),
        *(("mistral_v0_2", "sentencepiece"), ("deepseek_v2", "sentencepiece"), ("phi4_like", "gpt2")),
    ],
)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(question=TEXTS, said=TEXTS)
def test_what_learns_follows_what_generation_is_asked_with(name: str, kind: str, question: str, said: str):
    template = made(name, kind)
    messages = [user(question), answer(said)]
    try:
        encoded = template.encode(Row(tuple(messages)))
    except BadRowError as error:
        assert "begins inside the token" in str(error)  # white space that melts into the prompt
        return
    fast = template.tokenizer
    prompt = fast.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    places = np.flatnonzero(encoded.weights)
    assert encoded.ids[: places[0]].tolist() == prompt
    assert (np.diff(places) == 1).all() and set(encoded.weights[places].tolist()) == {1.0}
    assert fast.convert_ids_to_tokens(int(encoded.ids[places[-1]])) in template._renderer.ends
    whole = fast.apply_chat_template(messages, return_dict=False)
    assert encoded.ids.tolist() == whole
