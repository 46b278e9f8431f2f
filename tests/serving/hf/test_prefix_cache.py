"""The hf engine's prefix cache: what requests share is computed once, and no answer is another one by it."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import re
import threading
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
import transformers
from chat_model import save_chat_model
from generating import DECODER, Answer, answers, asked, generated, save_model

from swift_dist.serving.hf.app import create_app
from swift_dist.serving.hf.cache import BLOCK, Blocks, KeyValuePool, LayerShape
from swift_dist.serving.hf.generator import Generator
from swift_dist.serving.hf.requests import Sampling
from swift_dist.serving.hf.server import load
from swift_dist.serving.options import EngineOptions, ServedModel

SIZES = {**DECODER, "max_position_embeddings": 512}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS = {
    "full": transformers.LlamaConfig(**SIZES),
    "sliding": transformers.Gemma3TextConfig(
        **SIZES, sliding_window=16, query_pre_attn_scalar=8, layer_types=KINDS
    ),
}  # fmt: skip
GREEDY = Sampling(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)


def tokens(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(4, 320) for _ in range(count)]


def started(folder: Path, **options: Any) -> Generator:
    return Generator(ServedModel("tiny", str(folder), EngineOptions(**options)))


def ask(generator: Generator, prompt: list[int], sampling: Sampling = GREEDY, adapter: str | None = None) -> Answer:
    return answers(generator, [(prompt, sampling, adapter)])[0]


def reused(answer: Answer) -> int:
    assert answer.finished is not None
    return answer.finished.cached_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "full", MODELS["full"])


@pytest.fixture(scope="module")
def model(folder: Path) -> torch.nn.Module:
    return without_end(folder)


def without_end(folder: Path) -> torch.nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def generator(folder: Path) -> Any:
    generator = started(folder)
    yield generator
    generator.close()


@torch.inference_mode()
def logprobs(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
    every = torch.log_softmax(model(torch.tensor([prompt + answer])).logits[0].float(), -1)
    return every[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None]).squeeze(1)


@pytest.mark.parametrize("name", MODELS)
def test_each_turn_of_a_conversation_computes_what_is_new(name: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / name, MODELS[name])
    model, generator = without_end(folder), started(folder)
    try:
        conversation, known = tokens(100, 0), 0
        for turn in range(4):
            answer = ask(generator, conversation)
            assert answer.ids == generated(model, conversation, 12)
            got = torch.tensor([token.logprob for token in answer.tokens])
            torch.testing.assert_close(got, logprobs(model, conversation, answer.ids), rtol=0, atol=1e-5)
            assert reused(answer) == known
            # the answer's last token was never seen by the model; the answer is part of what the next turn begins with
            known = (len(conversation) + 11) // BLOCK * BLOCK
            conversation = conversation + answer.ids + tokens(21, turn + 1)
    finally:
        generator.close()


def test_many_requests_with_one_beginning(generator: Generator, model: torch.nn.Module) -> None:
    system = tokens(70, 7)
    prompts = [system + tokens(3 * number, number) for number in range(1, 17)] + [system, system[:64], system[:40]]
    ask(generator, system)
    found = answers(generator, [(prompt, GREEDY) for prompt in prompts])
    for prompt, answer in zip(prompts, found, strict=True):
        assert answer.ids == generated(model, prompt, 12)
        # all of a prompt is never taken: its last token's logits are wanted
        assert reused(answer) == min(64, (len(prompt) - 1) // BLOCK * BLOCK)
    other = [system[0] ^ 1, *system[1:]]
    assert reused(ask(generator, other)) == 0


def test_several_answers_to_one_prompt(generator: Generator, model: torch.nn.Module) -> None:
    prompt = tokens(60, 3)
    drawn = [Sampling(temperature=1, seed=seed, max_tokens=12, ignore_eos=True) for seed in range(4)]
    first = [answer.ids for answer in answers(generator, [(prompt, one) for one in drawn])]
    again = answers(generator, [(prompt, one) for one in drawn])
    assert [answer.ids for answer in again] == first
    assert [reused(answer) for answer in again] == [48] * 4
    assert ask(generator, prompt).ids == generated(model, prompt, 12)


def test_answers_to_one_long_prompt_that_are_asked_for_at_once(generator: Generator, model: torch.nn.Module) -> None:
    prompt = tokens(300, 8)  # more than half of what is computed in a step
    gate = threading.Event()

    async def together() -> list[Answer]:
        generator._send(gate.wait)  # none begins before all are there
        tasks = [asyncio.create_task(asked(generator, prompt, GREEDY)) for _ in range(8)]
        await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(*tasks)

    found = asyncio.run(together())
    assert [reused(answer) for answer in found] == [0, *[288] * 7]
    assert [answer.ids for answer in found] == [generated(model, prompt, 12)] * 8


def test_a_prompt_that_is_scored_is_computed_whole(generator: Generator, model: torch.nn.Module) -> None:
    prompt = tokens(60, 4)
    ask(generator, prompt)
    answer = ask(generator, prompt, dataclasses.replace(GREEDY, prompt_logprobs=1))
    assert answer.prompt is not None
    assert reused(answer) == 0
    assert [token.id for token in answer.prompt.tokens] == prompt
    got = torch.tensor([token.logprob for token in answer.prompt.tokens[1:]])
    torch.testing.assert_close(got, logprobs(model, prompt[:1], prompt[1:]), rtol=0, atol=1e-5)
    assert answer.ids == generated(model, prompt, 12)
    assert reused(ask(generator, prompt)) == 48


def test_what_a_cancelled_request_computed_is_right(generator: Generator, model: torch.nn.Module) -> None:
    prompt = tokens(50, 5)

    async def conversation() -> Answer:
        stream = generator.submit(prompt, dataclasses.replace(GREEDY, max_tokens=400))
        begun = [await anext(stream) for _ in range(20)]
        await stream.aclose()
        while generator.running:
            await asyncio.sleep(0.001)
        return await asked(generator, prompt + [event.id for event in begun], GREEDY)

    answer = asyncio.run(conversation())
    longer = prompt + generated(model, prompt, 20)
    assert answer.ids == generated(model, longer, 12)
    assert reused(answer) == 64


def test_adapters_share_with_nobody(folder: Path, model: torch.nn.Module, tmp_path: Path) -> None:
    places = {}
    for seed, name in enumerate(("one", "two")):
        adapted = peft.get_peft_model(
            transformers.AutoModelForCausalLM.from_pretrained(folder),
            peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM"),
        )
        torch.manual_seed(seed)
        for weight in adapted.parameters():
            if weight.requires_grad:
                torch.nn.init.normal_(weight, 0.0, 0.3)
        places[name] = tmp_path / name
        adapted.save_pretrained(places[name])
    prompt = tokens(60, 6)
    plain = generated(model, prompt, 12)
    expected = {
        name: generated(peft.PeftModel.from_pretrained(without_end(folder), place), prompt, 12)
        for name, place in places.items()
    }
    assert len({str(ids) for ids in (plain, *expected.values())}) == 3
    generator = started(folder)

    async def conversation() -> None:
        await generator.load_adapter("a", str(places["one"]))
        for adapter, ids in ((None, plain), ("a", expected["one"])):
            for known in (0, 48):
                answer = await asked(generator, prompt, GREEDY, adapter)
                assert (answer.ids, reused(answer)) == (ids, known)
        await generator.unload_adapter("a")
        await generator.load_adapter("a", str(places["two"]))
        for known in (0, 48):
            answer = await asked(generator, prompt, GREEDY, "a")
            assert (answer.ids, reused(answer)) == (expected["two"], known)

    try:
        asyncio.run(conversation())
    finally:
        generator.close()


def test_in_a_small_cache_the_longest_unused_goes_first(folder: Path, model: torch.nn.Module) -> None:
    per_token = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dim, bytes
    generator = started(folder, cpu_cache_gib=per_token * 20 * BLOCK / 2**30)
    try:
        first, second, third, fourth = (tokens(100, seed) for seed in range(20, 24))  # 7 blocks each
        for prompt, known in ((first, 0), (second, 0), (first, 96), (third, 0), (fourth, 0), (first, 96)):
            answer = ask(generator, prompt)
            assert (answer.ids, reused(answer)) == (generated(model, prompt, 12), known)
        assert reused(ask(generator, second)) < 96
        # more than fits, all at once: some are put back on the way
        prompts = [first[:50] + tokens(40, seed) for seed in range(8)]
        for prompt, answer in zip(prompts, answers(generator, [(one, GREEDY) for one in prompts]), strict=True):
            assert answer.ids == generated(model, prompt, 12)
        assert generator._runner.pool.free_blocks == generator._runner.pool.blocks == 20
    finally:
        generator.close()


def test_keys_that_change_with_the_length_are_not_shared(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    folder = save_model(tmp_path / "dynamic", transformers.LlamaConfig(**SIZES, rope_parameters=rope))
    generator = started(folder)
    try:
        assert [reused(ask(generator, tokens(60, 1))) for _ in range(2)] == [0, 0]
    finally:
        generator.close()


def test_the_metrics_count_tokens(tmp_path: Path) -> None:
    serving = load(ServedModel("tiny", str(save_chat_model(tmp_path)), EngineOptions(dtype="fp32")))
    body = {"prompt": tokens(50, 0), "max_tokens": 2}

    async def run() -> str:
        transport = httpx.ASGITransport(create_app(serving))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            for n in (1, 2):
                assert (await client.post("/v1/completions", json={**body, "n": n})).status_code == 200
            return (await client.get("/metrics")).text

    try:
        text = asyncio.run(run())
    finally:
        serving.generator.close()
    found = {key: float(re.search(rf"^swift_dist:prefix_cache_{key}_total (\S+)", text, re.M)[1])
             for key in ("queries", "hits")}  # fmt: skip
    assert found == {"queries": 150, "hits": 96}


@pytest.mark.parametrize("seed", range(20))
def test_a_block_that_is_read_holds_the_text_it_is_read_for(seed: int) -> None:
    """Sequences begin, grow, end and begin again at random; a block's content is written down at its last writing."""
    rng = random.Random(seed)
    pool = KeyValuePool([LayerShape(1, 1, 1, torch.float32)], 12 * BLOCK, torch.device("cpu"))
    texts = [pool.empty_text() for _ in range(2)]
    written: dict[int, tuple] = {}
    running: list[tuple[Blocks, int, list[int]]] = []
    adopted = 0
    for _ in range(400):
        if rng.random() < 0.5 or not running:
            whose, blocks = rng.randrange(2), Blocks(12)
            prompt = [at // BLOCK * 10 + rng.randrange(2) * (at % BLOCK == 0) for at in range(rng.randrange(1, 90))]
            cached = pool.adopt(blocks, texts[whose], prompt)
            assert cached < len(prompt)
            for at in range(0, cached, BLOCK):
                assert written[int(blocks.table[at // BLOCK])] == (whose, prompt[: at + BLOCK])
            adopted += cached
            if not pool.reserve(blocks, len(prompt)):
                pool.release(blocks)
                continue
            taken = [int(b) for other, _, _ in running for b in other.table[: other.count]]
            mine = [int(b) for b in blocks.table[: blocks.count]]
            assert len(set(mine)) == len(mine)
            assert 0 not in mine
            assert not set(mine[cached // BLOCK :]) & set(taken)  # what is written is nobody else's
            for at in range(cached, len(prompt), BLOCK):
                written[mine[at // BLOCK]] = (whose, prompt[: at + BLOCK])
            pool.keep(blocks, prompt, len(prompt))
            running.append((blocks, whose, prompt))
        else:
            pool.release(running.pop(rng.randrange(len(running)))[0])
        distinct = {int(b) for blocks, _, _ in running for b in blocks.table[: blocks.count]}
        assert pool.free_blocks == pool.blocks - len(distinct)
    assert adopted > 1000
