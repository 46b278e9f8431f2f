"""Pairs, judged answers, text, words, per-message weights, loss scales, and what goes to worker processes."""

from __future__ import annotations

import pickle
from itertools import pairwise

import numpy as np
import pytest

from swift_dist.config.finetune import TemplateSection
from swift_dist.data.rows import BadRowError, Row
from swift_dist.data.templates.loss_scale import LOSS_SCALES, weighted_ranges
from swift_dist.data.templates.template import Template, load_template
from swift_dist.errors import JobError
from tests.data.templates.cases import ONE, TWO, chatml
from tests.data.templates.tiny import answer, call, made_with, result, shown, system, template, tokenizer, user

PAIR = Row((*TWO[:3], answer("Fine.")), rejected=(answer("Go away."),), num_answer=1)


def test_pair_has_one_prompt_and_weights_on_the_answers_only():
    made = template("chatml")
    chosen, rejected = made.encode_pair(PAIR)
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    assert shown(made, chosen) == prompt + chatml("", "How?", "Fine.")
    assert shown(made, rejected) == prompt + chatml("", "How?", "Go away.")


def test_pair_with_answers_of_several_messages():
    made = template("qwen2_5")
    row = Row((user("Hi"), call(), result("3"), answer("Cold.")), rejected=(answer("Warm."),), num_answer=3)
    chosen, rejected = (shown(made, encoded) for encoded in made.encode_pair(row))
    assert chosen.count("⟦") == 2 and chosen.endswith("⟦Cold.<|im_end|>⟧\n")
    assert rejected.count("⟦") == 1 and rejected.endswith("Hi<|im_end|>\n<|im_start|>assistant\n⟦Warm.<|im_end|>⟧\n")


def test_pair_whose_prompt_depends_on_the_answer_is_refused():
    # Marks are believed, so nothing else notices that the template looks ahead.
    marked = "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    source = (
        "{% if messages[-1]['content'] == 'Fine.' %}!{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{% if m['role'] == 'assistant' %}" + marked + "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    with pytest.raises(BadRowError, match="writes the prompt differently"):
        Template(made_with(source), TemplateSection()).encode_pair(PAIR)
    with pytest.raises(BadRowError, match="no preference pair"):
        template("chatml").encode_pair(Row(ONE))


def test_judged_answer_and_another_row_s():
    made = template("chatml")
    row = Row(TWO, num_answer=1, label=True)
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    assert shown(made, made.encode(row)) == prompt + chatml("", "How?", "Fine.")
    other = Row((user("Why?"), answer("Because.")), num_answer=1, label=False)
    assert shown(made, made.encode_prompt_and(row, other)) == prompt + chatml("", "How?", "Because.")
    with pytest.raises(BadRowError, match="no answer that is judged"):
        made.encode_prompt_and(row, Row(ONE))


def test_per_message_loss():
    made = template("chatml")
    encoded = made.encode(Row((user("Hi"), answer("Hello.", loss=0.25), user("How?"), answer("Fine.", loss=True))))
    assert shown(made, encoded) == chatml("", "Hi", "Hello.", "How?", "Fine.")
    weights = encoded.weights[encoded.weights > 0]
    first = len(made.tokenizer("Hello.<|im_end|>")["input_ids"])
    assert weights.tolist() == [0.25] * first + [1.0] * (len(weights) - first)
    silent = made.encode(Row((user("Hi"), answer("Hello.", loss=False), *TWO[2:])))
    assert shown(made, silent) == chatml("", "Hi", "Hello.", "How?", "Fine.").replace(
        "⟦Hello.<|im_end|>⟧", "Hello.<|im_end|>"
    )


def test_turn_that_does_not_learn_may_be_rewritten():
    made = template("qwen3")
    encoded = made.encode(Row((user("Hi"), answer("Hello.", loss=0), *TWO[2:])))
    assert shown(made, encoded).count("⟦") == 1


def test_all_and_last_round():
    row = Row((system("Be brief."), *TWO, user("Bye")))
    made = template("qwen3", loss_scale="all")
    weights = made.encode(row).weights
    assert weights[0] == 0 and (weights[1:] == 1).all()
    made = template("chatml", loss_scale="all")
    quiet = made.encode(Row((user("Hi"), answer("Hello.", loss=0), *TWO[2:])))
    assert (quiet.weights == 0).sum() == 1 + len(made.tokenizer("Hello.<|im_end|>")["input_ids"])
    # What follows the last question, and the calls of tools before the answer to it.
    made = template("qwen2_5", loss_scale="last_round")
    encoded = made.encode(Row((*ONE, user("How?"), call(), result("3"), answer("Fine."))))
    text = shown(made, encoded)
    assert text.count("⟦") == 2 and "⟦<tool_call>" in text and "⟦Fine." in text


def test_answers_only_learn_in_pairs_under_all():
    chosen, _ = template("chatml", loss_scale="all").encode_pair(PAIR)
    assert shown(template("chatml"), chosen).count("⟦") == 1


@pytest.mark.parametrize(
    ("scale", "text", "expected"),
    [
        ("default", "Action: a\nObservation: b", {}),
        (
            "react",
            "Hm.\nThought: t\nAction: a\nAction Input: i\nObservation: o\nFinal Answer: f",
            {"Action:": 2, " a\n": 2, "Action Input:": 2, " i\n": 2, "Observation:": 2, " o\n": 0},
        ),
        ("react", "Bye.", {}),
        ("alpha_umi", "Next: caller", {"Next:": 2, " caller": 2}),
        (
            "agentflan",
            "Action: a\nAction Input: i\nArguments: x",
            {" a\n": 3, "Action Input:": 2, " i\n": 2, " x": 3},
        ),
        (
            "hermes",
            "So.\n<tool_call>\n{}\n</tool_call>\n<tool_call>1</tool_call>!",
            {"<tool_call>\n{}\n</tool_call>": 2, "<tool_call>1</tool_call>": 2},
        ),
    ],
)
def test_loss_scales(scale: str, text: str, expected: dict[str, float]):
    found = weighted_ranges(LOSS_SCALES[scale], text)
    assert {text[start:end]: weight for start, end, weight in found} == expected
    assert all(before[1] <= after[0] for before, after in pairwise(found))


def test_loss_scale_of_tokens():
    made = template("chatml", loss_scale="react")
    encoded = made.encode(Row((user("Hi"), answer("Thought: t\nAction: a\nObservation: o\nThought: u"))))
    pieces = {0.0: "", 1.0: "", 2.0: ""}
    for token, weight in zip(encoded.ids.tolist(), encoded.weights.tolist(), strict=True):
        pieces[weight] += made.tokenizer.decode([token])
    assert pieces[2.0] == "Action: a\nObservation:"
    assert pieces[1.0] == "Thought: t\nThought: u<|im_end|>"
    assert pieces[0.0].endswith("<|im_start|>assistant\n o\n\n")


def test_token_over_a_border_takes_the_smaller_weight():
    from swift_dist.data.templates.align import token_weights

    characters = np.array([0, 0, 2, 2, 1, 1, 0], np.float32)
    offsets = np.array([[0, 2], [2, 3], [3, 5], [5, 6], [6, 7]])
    assert token_weights("abcdefg", offsets, characters, [(2, 6)]).tolist() == [0, 2, 1, 1, 0]
    # Two tokens of one character (bytes of an emoji), and a space that the offsets leave out.
    offsets = np.array([[0, 2], [2, 3], [2, 3], [4, 6], [6, 7]])
    assert token_weights("abcdefg", offsets, characters, [(2, 6)]).tolist() == [0, 2, 2, 1, 0]
    with pytest.raises(BadRowError, match="inside the token 'bc'"):
        token_weights("abcdefg", np.array([[0, 1], [1, 3], [3, 7]]), characters, [(2, 6)])


def test_space_that_offsets_leave_out_belongs_to_the_token_after_it():
    from swift_dist.data.templates.align import token_weights

    characters = np.array([0, 0, 1, 1], np.float32)
    with pytest.raises(BadRowError, match="inside the token ' b'"):
        token_weights("a bc", np.array([[0, 1], [2, 3], [3, 4]]), characters, [(2, 4)])


def test_end_of_turn_that_takes_the_line_break_behind_it():
    # Phi-3's special tokens take the white space to their right.
    from tokenizers import AddedToken

    made = Template(made_with(tokenizer("chatml").chat_template), TemplateSection())
    ends = [AddedToken(f"<|{name}|>", rstrip=True, special=True) for name in ("end", "user", "assistant")]
    made.tokenizer.add_tokens(ends, special_tokens=True)
    made.tokenizer.chat_template = tokenizer("phi3").chat_template
    made.check()
    encoded = made.encode(Row(TWO))
    assert shown(made, encoded) == (
        "<|user|>Hi<|end|><|assistant|>⟦Hello.<|end|>⟧<|user|>How?<|end|><|assistant|>⟦Fine.<|end|>⟧</s>"
    )
    made.tokenizer.chat_template = tokenizer("phi3").chat_template.replace("<|end|>\n", "<|end|>X")
    with pytest.raises(BadRowError, match="after the token that ends the turn"):
        made.encode(Row(ONE))


def _sentencepiece(source: str):
    """A tokenizer as Llama 2's: no words, spaces as ▁ with one before the text, bytes for unknown characters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bare.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bare.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["hello there how are you fine [INST] [/INST] Hi Hello."] * 9
    bare.train_from_iterator(words, trainers.BpeTrainer(vocab_size=420, special_tokens=specials, show_progress=False))
    made = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = source
    return made


def test_sentencepiece_tokenizers():
    made = Template(_sentencepiece(tokenizer("deepseek_v2").chat_template), TemplateSection())
    made.check()
    encoded = made.encode(Row((user("Hi 🙂"), answer("Hello. 🙂"), *TWO[2:])))
    learned = made.tokenizer.decode(encoded.ids[encoded.weights > 0].tolist())
    assert learned == " Hello. 🙂</s> Fine.</s>"


def test_answers_of_many_bytes_a_character():
    for trim_offsets in (False, True):
        made = template("chatml", trim_offsets=trim_offsets)
        encoded = made.encode(Row((user("你好 🙂"), answer("很好 🙂🙂 ok"))))
        learned = made.tokenizer.decode(encoded.ids[encoded.weights > 0].tolist())
        assert learned == "很好 🙂🙂 ok<|im_end|>"


def test_text_has_bos_and_eos_and_learns_but_for_its_first_token():
    made = template("chatml")
    encoded = made.encode(Row(text="hello there"))
    ids = made.tokenizer("hello there")["input_ids"]
    assert encoded.ids.tolist() == [*ids, made.tokenizer.eos_token_id]
    assert encoded.weights.tolist() == [0.0] + [1.0] * len(ids)
    from tokenizers.processors import TemplateProcessing

    with_bos = made_with(None)
    bos = with_bos.bos_token_id
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", with_bos.eos_token_id)]
    )
    encoded = Template(with_bos, TemplateSection()).encode_text("hello there")
    assert encoded.ids.tolist() == [bos, *ids, with_bos.eos_token_id]
    with pytest.raises(BadRowError, match="empty"):
        made.encode_text("")


def test_rows_to_classify():
    made = template("chatml")
    encoded = made.encode(Row(text="hello there", label=1))
    assert encoded.ids.tolist() == made.encode_text("hello there").ids.tolist() and not encoded.weights.any()
    encoded = made.encode(Row((user("Hi"),), label=[0, 2]))
    assert shown(made, encoded) == "<|im_start|>user\nHi<|im_end|>\n"


def test_words_to_classify():
    made = template("chatml")
    for trim_offsets in (False, True):
        made = template("chatml", trim_offsets=trim_offsets)
        encoded = made.encode(Row(text="hello zebra 你好 x", label=[0, 3, -100, 1]))
        assert encoded.ids.tolist() == made.tokenizer("hello zebra 你好 x")["input_ids"]
        starts = np.flatnonzero(encoded.weights)
        before = [made.tokenizer.decode(encoded.ids[:start].tolist()).strip() for start in starts]
        assert before == ["", "hello", "hello zebra", "hello zebra 你好"]
    with pytest.raises(BadRowError, match="1 labels for 2 words"):
        made.encode_words(Row(text="hello there", label=[1]))


def test_template_in_another_process_encodes_the_same(tmp_path):
    made = template("llama3_2", loss_scale="last_round")
    made._now = made._now.replace(year=2031)
    again = pickle.loads(pickle.dumps(made))
    assert again.encode(Row(TWO)).ids.tolist() == made.encode(Row(TWO)).ids.tolist()
    made.tokenizer.save_pretrained(tmp_path)
    loaded = load_template(str(tmp_path), TemplateSection())
    assert len(pickle.dumps(loaded)) < 1000  # its arguments, not its tokenizer
    again = pickle.loads(pickle.dumps(loaded))
    assert again.encode(Row(TWO)).ids.tolist() == loaded.encode(Row(TWO)).ids.tolist()
    with pytest.raises(JobError, match="no tokenizer in"):
        load_template(str(tmp_path / "none"), TemplateSection())
