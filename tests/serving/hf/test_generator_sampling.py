"""How the hf engine draws: every option against what it says, written out by hand or computed by transformers."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import torch
import transformers
from chat_model import save_chat_model
from generating import Answer, answers, prompts
from transformers.generation import logits_process

from swift_dist.serving.hf.generator import Generator
from swift_dist.serving.hf.requests import Guide, Sampling
from swift_dist.serving.hf.sampling import RowSampler, draw, shaped
from swift_dist.serving.hf.text import Detokenizer, StopTexts, decoder
from swift_dist.serving.options import EngineOptions, ServedModel

VOCABULARY = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def model(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def generator(folder: Path) -> Iterator[Generator]:
    generator = Generator(ServedModel("tiny", str(folder), EngineOptions(seed=7)))
    yield generator
    generator.close()


def one(generator: Generator, prompt: list[int], sampling: Sampling) -> Answer:
    return answers(generator, [(prompt, sampling)])[0]


# one draw


def row(options: Sampling, prompt: tuple[int, ...] = (), answer: tuple[int, ...] = (), seed: int = 0) -> RowSampler:
    sampler = RowSampler(options, prompt, (2,), torch.Generator().manual_seed(seed))
    for token in answer:
        sampler.took(token)
    return sampler


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def shares(options: Sampling, own: torch.Tensor, number: int = 10000) -> torch.Tensor:
    """How often each token is drawn from logits [vocabulary]."""
    rows = [row(options, seed=seed) for seed in range(number)]
    tokens = torch.tensor([d.token for d in draw(own.expand(number, -1), rows, None)])
    return torch.bincount(tokens, minlength=len(own)) / number


@pytest.mark.parametrize(
    ("options", "processors"),
    [
        ({}, []),
        ({"temperature": 0.5}, [logits_process.TemperatureLogitsWarper(0.5)]),
        ({"top_k": 3}, [logits_process.TopKLogitsWarper(3)]),
        ({"top_p": 0.6}, [logits_process.TopPLogitsWarper(0.6)]),
        ({"min_p": 0.2}, [logits_process.MinPLogitsWarper(0.2)]),
        (
            {"temperature": 1.7, "top_k": 8, "top_p": 0.8},
            [
                logits_process.TemperatureLogitsWarper(1.7),
                logits_process.TopKLogitsWarper(8),
                logits_process.TopPLogitsWarper(0.8),
            ],
        ),
    ],
)
def test_tokens_are_drawn_as_often_as_transformers_says(options: dict, processors: list) -> None:
    own = logits()
    expected = own
    for process in processors:
        expected = process(None, expected)
    expected = expected.softmax(-1)[0]
    found = shares(Sampling(**options), own[0])
    assert (found[expected == 0] == 0).all()
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def test_rows_of_one_batch_keep_their_own_options() -> None:
    own = logits(4, seed=1)
    options = [
        Sampling(temperature=0),
        Sampling(top_k=1),
        Sampling(seed=1, temperature=0.8),
        Sampling(temperature=0, logit_bias={7: 100.0}),
    ]
    together = draw(own, [row(o, seed=5) for o in options], None)
    alone = [draw(own[at : at + 1], [row(o, seed=5)], None)[0] for at, o in enumerate(options)]
    assert together == alone
    assert [together[0].token, together[1].token, together[3].token] == [*own[:2].argmax(-1).tolist(), 7]


def test_penalties_by_hand() -> None:
    own, prompt, answer = logits(), (3, 4, 4), (5, 6, 6, 6)
    options = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.25}
    expected = own.clone()[0]
    for token in {*prompt, *answer}:
        expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
    for token, count in ((5, 1), (6, 3)):
        expected[token] -= 0.4 + 0.25 * count
    found = shaped(own, [row(Sampling(**options), prompt, answer)], None)[0]
    torch.testing.assert_close(found, expected)
    repeated = logits_process.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[*prompt, *answer]]), own.clone())[0]
    alone = shaped(own, [row(Sampling(repetition_penalty=1.3), prompt, answer)], None)[0]
    torch.testing.assert_close(alone, repeated)


def test_no_end_before_min_tokens() -> None:
    own = torch.zeros(1, VOCABULARY)
    own[0, 2] = 10
    options = Sampling(temperature=0, min_tokens=2)
    assert draw(own, [row(options, answer=(5,))], None)[0].token != 2
    assert draw(own, [row(options, answer=(5, 5))], None)[0].token == 2


# whole answers


def test_a_seed_gives_the_same_answer_in_any_batch(generator: Generator) -> None:
    wanted = (prompts(1)[0], Sampling(max_tokens=20, seed=123, top_p=0.9, ignore_eos=True))
    others = [(p, Sampling(max_tokens=9, temperature=1.5)) for p in prompts(12, 40, seed=4)]
    alone = one(generator, *wanted)
    first, second = answers(generator, [*others, wanted]), answers(generator, [wanted, *others[:3]])
    assert alone.ids == first[-1].ids == second[0].ids
    assert one(generator, wanted[0], Sampling(max_tokens=20, seed=124, top_p=0.9, ignore_eos=True)).ids != alone.ids


def test_without_a_seed_answers_differ(generator: Generator) -> None:
    free = Sampling(max_tokens=20, ignore_eos=True)
    assert len({tuple(a.ids) for a in answers(generator, [([5, 6, 7], free)] * 4)}) == 4


def test_where_a_process_begins_to_draw(folder: Path) -> None:
    """Replicas differ where no seed is given, and do not where one is, however large."""

    def drawn(**options: object) -> list[int]:
        generator = Generator(ServedModel("tiny", str(folder), EngineOptions(**options)))
        try:
            return one(generator, [5, 6, 7], Sampling(max_tokens=20, ignore_eos=True)).ids
        finally:
            generator.close()

    assert drawn() != drawn()
    assert drawn(seed=20261128123456) == drawn(seed=20261128123456) != drawn(seed=0)
    assert len(drawn(seed=-1)) == 20


def test_logprobs_are_a_plain_forward_s(generator: Generator, model: torch.nn.Module) -> None:
    prompt = prompts(2, 30, seed=5)[1]
    changed = {"temperature": 0.3, "presence_penalty": 1.0, "logit_bias": {9: 5.0}, "seed": 1}
    answer = one(generator, prompt, Sampling(max_tokens=6, logprobs=3, prompt_logprobs=2, ignore_eos=True, **changed))
    with torch.inference_mode():
        whole = model(torch.tensor([prompt + answer.ids])).logits[0].log_softmax(-1)
    for at, token in enumerate(answer.tokens):
        expected = whole[len(prompt) + at - 1]
        assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-4)
        values, ids = expected.topk(3)
        assert [a.id for a in token.top] == ids.tolist()
        assert [a.logprob for a in token.top] == pytest.approx(values.tolist(), abs=1e-4)
    scored = answer.prompt.tokens
    assert [t.id for t in scored] == prompt
    assert scored[0].logprob is None
    for at, token in enumerate(scored[1:]):
        assert token.logprob == pytest.approx(float(whole[at, token.id]), abs=1e-4)
        assert [a.id for a in token.top] == whole[at].topk(2).indices.tolist()
    assert b"".join(t.piece for t in answer.tokens).decode(errors="replace") == answer.text


def test_an_answer_ends_at_a_stop_text_wherever_tokens_end(generator: Generator) -> None:
    free = Sampling(temperature=0, max_tokens=60, ignore_eos=True)
    text = one(generator, [5, 6, 7], free).text
    for start, length in ((8, 1), (11, 5), (20, 7)):
        stop = text[start : start + length]
        first = text.index(stop)
        for include in (False, True):
            answer = one(
                generator,
                [5, 6, 7],
                Sampling(temperature=0, max_tokens=60, ignore_eos=True, stop=("never", stop), include_stop=include),
            )
            assert answer.text == text[: first + (length if include else 0)]
            assert (answer.finished.reason, answer.finished.stop) == ("stop", stop)
            assert answer.finished.completion_tokens == len(answer.ids) < 60
    half = one(generator, [5, 6, 7], Sampling(temperature=0, max_tokens=60, ignore_eos=True, stop=(text[-3:] + "x",)))
    assert half.text == text  # the beginning of a stop text that never came is shown at the end
    assert half.finished.reason == "length"


def test_ends(generator: Generator) -> None:
    toward = {"temperature": 0, "logit_bias": {2: 1000.0}, "max_tokens": 4}
    answer = one(generator, [5], Sampling(**toward))
    assert (answer.ids, answer.text, answer.finished.reason, answer.finished.stop) == ([2], "", "stop", 2)
    assert len(one(generator, [5], Sampling(**toward, ignore_eos=True)).ids) == 4
    late = one(generator, [5], Sampling(**toward, min_tokens=3))
    assert (late.ids.index(2), len(late.ids)) == (3, 4)
    named = one(generator, [5], Sampling(temperature=0, logit_bias={9: 1000.0}, stop_token_ids=(9,), ignore_eos=True))
    assert (named.ids, named.finished.stop) == ([9], 9)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "days": {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 1, "maxItems": 3},
        "sure": {"type": "boolean"},
    },
    "required": ["name", "days", "sure"],
    "additionalProperties": False,
}
LIST = 'start: "[" item ("," item){0,2} "]"\nitem: /[a-c]{1,3}/'


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_guided_answers_are_of_the_wanted_form(generator: Generator, temperature: float) -> None:
    guides = [
        Guide("json_schema", json.dumps(SCHEMA)),
        Guide("regex", "(a|bc){2}-[0-9]{3}"),
        Guide("choice", ("yes", 'no "é"', "yesterday")),
        Guide("grammar", LIST),
        Guide("grammar", 'root ::= "x" ("y" | "z")'),
    ]
    found = answers(
        generator,
        [([5, 6, 7], Sampling(temperature=temperature, max_tokens=200, guide=guide)) for guide in guides * 3],
    )
    for guide, answer in zip(guides * 3, found, strict=True):
        assert answer.finished.reason == "stop"
        if guide.kind == "json_schema":
            jsonschema.validate(json.loads(answer.text), SCHEMA)
        elif guide.kind == "regex":
            assert re.fullmatch(guide.value, answer.text)
        elif guide.kind == "choice":
            assert answer.text in guide.value
        elif "root" in guide.value:
            assert answer.text in ("xy", "xz")
        else:
            assert re.fullmatch(r"\[[abc]{1,3}(,[abc]{1,3}){0,2}\]", answer.text)


def test_any_json_object_and_free_text_beside_it(generator: Generator, model: torch.nn.Module) -> None:
    # The bias makes a random model close what it opens.
    bias = dict.fromkeys(generator.tokenizer.encode('}"', add_special_tokens=False), 6.0)
    guided = Sampling(temperature=0, max_tokens=300, guide=Guide("json_object"), logit_bias=bias)
    free = Sampling(temperature=0, max_tokens=10, ignore_eos=True)
    found = answers(generator, [([5, 6], guided), ([5, 6, 7], free)])
    assert isinstance(json.loads(found[0].text), dict)
    assert found[1].ids == one(generator, [5, 6, 7], free).ids


@pytest.mark.parametrize(
    "guide",
    [
        Guide("json_schema", "{"),
        Guide("json_schema", "[]"),
        Guide("json_schema", '{"type": "nothing"}'),
        Guide("json_schema", '{"type": "array", "uniqueItems": true}'),
        Guide("regex", "[ab"),
        Guide("grammar", "start: nowhere"),
        Guide("grammar", "root ::= ("),
        Guide("choice", ()),
        Guide("grammar", ""),
    ],
)
def test_a_guide_that_cannot_be_followed_is_refused(generator: Generator, guide: Guide) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        one(generator, [5], Sampling(guide=guide))
    assert generator.running == 0


# text


@pytest.mark.parametrize("text", ["the moon is é 日本 🙂🙃", "a\ufffdb", "", "🙂", "  two  spaces "])
def test_texts_of_tokens_add_up_and_no_character_is_cut(folder: Path, text: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(decoder(tokenizer, True), tokenizer.encode("the moon"))
    parts = [detokenizer.push(token) for token in ids]
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) + detokenizer.flush() == text


def test_bytes_that_are_no_text_are_shown_as_the_decoder_shows_them(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    decode = decoder(tokenizer, True)
    for seed in range(30):
        rng = random.Random(seed)
        ids = [rng.randrange(0, 320) for _ in range(60)]
        detokenizer = Detokenizer(decode, [])
        assert "".join(detokenizer.push(token) for token in ids) + detokenizer.flush() == decode(ids)


def test_words_that_begin_with_a_mark_keep_their_spaces() -> None:
    from tokenizers import Tokenizer, decoders, models

    pieces = {"▁the": 0, "▁moon": 1, "s": 2, **{f"<0x{b:02X}>": 3 + i for i, b in enumerate("é".encode())}, "<unk>": 5}
    tokenizer = Tokenizer(models.WordLevel(pieces, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    detokenizer = Detokenizer(tokenizer.decode, [0])
    assert [detokenizer.push(token) for token in (1, 2, 3, 4, 0)] == [" moon", "s", "", "é", " the"]


def test_stop_texts_hold_back_no_more_than_they_must() -> None:
    stops = StopTexts(["abc", "xy"])
    assert [stops.push(part) for part in ("1a", "b", "d", "ab", "x")] == [
        ("1", None),
        ("", None),
        ("abd", None),
        ("", None),
        ("ab", None),
    ]
    assert stops.flush() == "x"
    assert StopTexts(["b", "ab"]).push("zabq") == ("z", "ab")
    assert StopTexts(["ab", "abc"], include=True).push("zabcq") == ("zabc", "abc")


def test_the_loop_may_end_before_the_answer(generator: Generator) -> None:
    async def left() -> None:
        await anext(generator.submit([5, 6], Sampling(max_tokens=200, ignore_eos=True)))

    asyncio.run(left())
    assert one(generator, [5, 6], Sampling(temperature=0, max_tokens=3)).finished is not None
