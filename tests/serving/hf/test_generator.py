"""The hf engine's generator: whatever else is in the batch, a request gets what transformers gives it alone."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from chat_model import save_tokenizer
from generating import DECODER, VOCABULARY, answers, asked, generated, prompts, save_model

from swift_dist.errors import JobError, RunError
from swift_dist.serving.hf import scheduler
from swift_dist.serving.hf.generator import Generator
from swift_dist.serving.hf.requests import GeneratorFailed, Sampling, Token
from swift_dist.serving.hf.runners import PooledRunner, SerialRunner
from swift_dist.serving.options import EngineOptions, ServedModel

SMALL = {"vocab_size": VOCABULARY, "eos_token_id": 2, "bos_token_id": 0, "initializer_range": 0.2}
SLIDING = {"sliding_window": 16, "query_pre_attn_scalar": 8}
MAMBA = {
    **SMALL,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 8,
    "num_heads": 8,
    "head_dim": 8,
    "n_groups": 1,
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, DECODER),
    "qwen3": (transformers.Qwen3Config, DECODER),
    "gemma2": (transformers.Gemma2Config, {**DECODER, **SLIDING}),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {**DECODER, **SLIDING, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gpt2": (transformers.GPT2Config, {**SMALL, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}),
    "mixtral": (transformers.MixtralConfig, {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mamba2": (transformers.Mamba2Config, MAMBA),
}


def greedy(tokens: int, **changes: object) -> Sampling:
    return Sampling(temperature=0, max_tokens=tokens, **changes)


def started(folder: Path, **options: object) -> Generator:
    return Generator(ServedModel("tiny", str(folder), EngineOptions(**options)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama", transformers.LlamaConfig(**DECODER))


@pytest.fixture(scope="module")
def model(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def generator(folder: Path) -> Iterator[Generator]:
    generator = started(folder)
    yield generator
    generator.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "PROMPT_TOKENS", 40)  # prompts come in parts
    kind, values = FAMILIES[family]
    folder = save_model(tmp_path / family, kind(**values))
    generator = started(folder, max_num_seqs=8)
    try:
        serial = family == "mamba2"
        assert isinstance(generator._runner, SerialRunner if serial else PooledRunner)
        requests = [(p, greedy(5 + 3 * i)) for i, p in enumerate(prompts(5 if serial else 9, 20 if serial else 100))]
        found = answers(generator, requests)
    finally:
        generator.close()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for (prompt, sampling), answer in zip(requests, found, strict=True):
        assert answer.ids == generated(model, prompt, sampling.max_tokens)
        assert (answer.finished.prompt_tokens, answer.finished.completion_tokens) == (len(prompt), len(answer.ids))
        assert answer.finished.reason == ("stop" if answer.ids[-1] == 2 else "length")
    assert len({token for answer in found for token in answer.ids}) > 5


def test_64_requests_at_once_and_one_that_comes_later(generator: Generator, model: torch.nn.Module) -> None:
    requests = [(p, greedy(5)) for p in prompts(64, 60, seed=1)]

    async def together() -> list:
        tasks = [asyncio.create_task(asked(generator, *request)) for request in requests]
        while generator.running < 32 and not tasks[-1].done():
            await asyncio.sleep(0.001)
        tasks.append(asyncio.create_task(asked(generator, [5, 6, 7], greedy(5))))
        return await asyncio.gather(*tasks)

    for (prompt, _), answer in zip([*requests, ([5, 6, 7], None)], asyncio.run(together()), strict=True):
        assert answer.ids == generated(model, prompt, 5)
    assert (generator.running, generator.waiting) == (0, 0)


def test_a_cache_that_is_too_small_for_all_delays_and_changes_nothing(folder: Path, model: torch.nn.Module) -> None:
    per_token = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dim, bytes
    generator = started(folder, cpu_cache_gib=per_token * 256 / 2**30)
    try:
        assert generator.model_max_length == 256
        requests = [(p, greedy(60)) for p in prompts(8, 30, seed=2)]
        pool, left = generator._runner.pool, []
        release = pool.release
        pool.release = lambda blocks: (left.append(blocks.count), release(blocks))
        found = answers(generator, requests)
        assert len(left) > 8  # some were put back on the way: all of them need 30 blocks at the end
        assert generator._runner.pool.free_blocks == 16
    finally:
        generator.close()
    for (prompt, _), answer in zip(requests, found, strict=True):
        assert answer.ids == generated(model, prompt, 60)


def scores(model: torch.nn.Module, prompt: list[int]) -> list[float]:
    """Log-probabilities of a prompt's tokens after its first."""
    with torch.inference_mode():
        found = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    return [float(found[at, token]) for at, token in enumerate(prompt[1:])]


def test_prompts_of_one_token_are_scored_beside_others(generator: Generator, model: torch.nn.Module) -> None:
    requests = [([token], greedy(3, prompt_logprobs=1)) for token in (5, 6, 7)] + [([8, 9], greedy(3))]
    *scored, plain = answers(generator, requests)
    assert [answer.prompt and [token.id for token in answer.prompt.tokens] for answer in scored] == [[5], [6], [7]]
    assert plain.prompt is None
    for (prompt, _), answer in zip(requests, [*scored, plain], strict=True):
        assert answer.ids == generated(model, prompt, 3)


def test_a_prompt_that_is_put_back_half_scored_is_scored_once(
    folder: Path, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "PROMPT_TOKENS", 16)
    generator = started(folder, cpu_cache_gib=3 * 2 * 2 * 8 * 4 * 256 / 2**30)
    try:
        put_back: list[int] = []
        leave = generator._scheduler._leave
        generator._scheduler._leave = lambda s: (put_back.append(len(s.scored)), leave(s))
        long = prompts(1, 1, seed=3)[0] * 200 + [9, 8, 7] * 13  # 15 of the 16 blocks: none for the other's 17th token
        _, answer = answers(generator, [([5, 6], greedy(30, ignore_eos=True)), (long, greedy(1, prompt_logprobs=0))])
    finally:
        generator.close()
    assert 0 < put_back[0] < len(long)
    assert [token.id for token in answer.prompt.tokens] == long
    assert [token.logprob for token in answer.prompt.tokens[1:]] == pytest.approx(scores(model, long), abs=1e-4)


def test_a_context_that_the_cache_cannot_hold(folder: Path) -> None:
    small = {"cpu_cache_gib": 64 * 384 / 2**30}
    with pytest.raises(RunError, match="only 64 tokens fit"):
        started(folder, max_model_len=256, **small)
    generator = started(folder, **small)
    try:
        assert generator.model_max_length == 64
        with pytest.raises(ValueError, match="the context of 64"):
            answers(generator, [(list(range(4, 70)), greedy(1))])
    finally:
        generator.close()
    with pytest.raises(JobError, match="more than the model's 256 positions"):
        started(folder, max_model_len=512)


def test_cancelling_frees_the_place_for_one_that_waits(folder: Path, model: torch.nn.Module) -> None:
    generator = started(folder, max_num_seqs=1)

    async def cancelled() -> list[int]:
        first = generator.submit([5, 6, 7], greedy(200, ignore_eos=True))
        seen = [await anext(first), await anext(first)]
        assert all(isinstance(event, Token) for event in seen)
        second = asyncio.create_task(asked(generator, [8, 9], greedy(5)))
        while generator.waiting < 1:
            await asyncio.sleep(0.001)
        assert generator.running == 1
        await first.aclose()
        assert [event async for event in first] == []
        return (await second).ids

    async def forgotten() -> None:
        stream = generator.submit([5, 6, 7], greedy(250, ignore_eos=True))
        await anext(stream)
        del stream
        gc.collect()
        end = time.monotonic() + 5
        while generator.running and time.monotonic() < end:
            await asyncio.sleep(0.001)

    try:
        assert asyncio.run(cancelled()) == generated(model, [8, 9], 5)
        asyncio.run(forgotten())
        assert generator.running == 0
        assert generator._runner.pool.free_blocks == generator._runner.pool.blocks
    finally:
        generator.close()


def test_a_long_prompt_does_not_stop_the_others(
    generator: Generator, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "PROMPT_TOKENS", 16)
    long = prompts(1, 1, seed=3)[0] * 200

    async def both() -> tuple[int, list[int]]:
        stream = generator.submit([5, 6, 7], greedy(100, ignore_eos=True))
        await anext(stream)
        task = asyncio.create_task(asked(generator, long, greedy(1)))
        between = 0
        while not task.done():
            await anext(stream)
            between += 1
        await stream.aclose()
        return between, task.result().ids

    between, ids = asyncio.run(both())
    assert between >= 200 // 16
    assert ids == generated(model, long, 1)


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ([], {}, "empty"),
        ([5] * 256, {}, "256 tokens; with one token of answer"),
        ([5] * 250, {"max_tokens": 7}, "250 tokens and max_tokens=7"),
        ([VOCABULARY], {}, "is no token"),
        ([-1], {}, "is no token"),
        ([5], {"max_tokens": 0}, "max_tokens=0"),
        ([5], {"temperature": -1.0}, "temperature"),
        ([5], {"temperature": float("nan")}, "temperature"),
        ([5], {"top_p": 0.0}, "top_p"),
        ([5], {"logit_bias": {VOCABULARY: 1.0}}, "logit_bias"),
        ([5], {"stop_token_ids": (-3,)}, "stop_token_ids"),
        ([5], {"presence_penalty": float("inf")}, "presence_penalty"),
        ([5], {"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
    ],
)
def test_what_cannot_be_asked(generator: Generator, prompt: list[int], changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        answers(generator, [(prompt, Sampling(**changes))])
    assert (generator.running, generator.waiting) == (0, 0)


def test_a_scheduler_that_fails_ends_every_request_with_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = started(folder)
    monkeypatch.setattr(generator._scheduler, "_admit", lambda: 1 / 0)
    with pytest.raises(GeneratorFailed, match="division by zero"):
        answers(generator, [([5, 6], greedy(3))])
    generator._thread.join(10)
    with pytest.raises(GeneratorFailed):
        answers(generator, [([5, 6], greedy(3))])
    generator.close()


def test_closing_breaks_off_what_runs(folder: Path) -> None:
    generator = started(folder)

    async def broken_off() -> None:
        stream = generator.submit([5, 6, 7], greedy(250, ignore_eos=True))
        await anext(stream)
        await asyncio.to_thread(generator.close)
        async for _ in stream:
            pass

    with pytest.raises(GeneratorFailed, match="closed"):
        asyncio.run(broken_off())
    assert not generator._thread.is_alive()


def test_a_model_whose_state_is_no_sequence_s_own_is_refused(tmp_path: Path) -> None:
    values = {k: v for k, v in DECODER.items() if k != "head_dim"}
    config = transformers.RecurrentGemmaConfig(**values, lru_width=32, attention_window_size=16)
    with pytest.raises(RunError, match="get other logits"):
        started(save_model(tmp_path / "recurrent", config))


def test_folders_that_hold_no_decoder_or_no_fast_tokenizer(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 4, "vocab_size": VOCABULARY}
    save_tokenizer(tmp_path / "t5")
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    with pytest.raises(JobError, match="encoder-decoder"):
        started(tmp_path / "t5")
    with pytest.raises(RunError, match="cannot be loaded"):
        started(tmp_path / "nothing")
    headless = transformers.LlamaModel(transformers.LlamaConfig(**{**DECODER, "tie_word_embeddings": False}))
    save_tokenizer(tmp_path / "headless")
    headless.save_pretrained(tmp_path / "headless")
    with pytest.raises(JobError, match=r"lacks the weight lm_head\.weight"):
        started(tmp_path / "headless")
    slow = save_model(tmp_path / "slow", transformers.LlamaConfig(**DECODER))
    (slow / "tokenizer.json").unlink()
    transformers.ByT5Tokenizer().save_pretrained(slow)
    with pytest.raises(JobError, match="ByT5Tokenizer is no tokenizer of"):
        started(slow)


def test_bf16_as_saved(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "half", transformers.LlamaConfig(**DECODER))
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    for dtype, expected in (("auto", torch.bfloat16), ("fp32", torch.float32)):
        generator = started(folder, dtype=dtype)
        try:
            assert generator._loaded.model.dtype == generator._runner.pool.keys[0].dtype == expected
            assert len(answers(generator, [([5, 6], greedy(5, ignore_eos=True))])[0].ids) == 5
        finally:
            generator.close()
