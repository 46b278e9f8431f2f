"""Adapters of the hf engine: what a request of one gets is what PEFT alone gives, whoever shares the batch."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import transformers
from chat_model import save_chat_model
from generating import answers, asked, generated, prompts

from swift_dist.errors import JobError
from swift_dist.serving.hf.generator import Generator
from swift_dist.serving.hf.requests import RequestFailed, Sampling
from swift_dist.serving.options import EngineOptions, ServedModel

GREEDY = Sampling(temperature=0, max_tokens=12, ignore_eos=True)
TARGETS = ["q_proj", "v_proj", "up_proj"]
CONFIGS = {
    "one": peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "two": peft.LoraConfig(r=8, target_modules=["k_proj", "down_proj"]),
    "dora": peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "head": peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"]),
    "parameters": peft.LoraConfig(r=4, target_modules=[], target_parameters=["gate_proj.weight"]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters with random weights that matter."""
    place, found = tmp_path_factory.mktemp("adapters"), {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
        torch.manual_seed(seed)
        for key, weight in model.named_parameters():
            if weight.requires_grad:
                torch.nn.init.normal_(weight, 1.0 if name == "ia3" else 0.0, 0.3)
                assert "base_layer" not in key
        found[name] = place / name
        model.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def alone(base: Path, folders: dict[str, Path]) -> dict[str | None, list[list[int]]]:
    """What transformers and PEFT generate for every prompt, with one adapter or none."""
    found: dict[str | None, list[list[int]]] = {}
    for name in (None, *folders):
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        model.generation_config.eos_token_id = None
        if name is not None:
            model = peft.PeftModel.from_pretrained(model, folders[name])
        found[name] = [_generated(model, prompt) for prompt in prompts(4, 30)]
    assert len({json.dumps(tokens) for tokens in found.values()}) == len(found)
    return found


def _generated(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    with torch.inference_mode():
        return generated(model, prompt, GREEDY.max_tokens)


def started(base: Path, adapters: dict[str, Path] | None = None, **options: object) -> Generator:
    named = {name: str(path) for name, path in (adapters or {}).items()}
    return Generator(ServedModel("base", str(base), EngineOptions(**options), named))


@pytest.fixture
def generator(base: Path) -> Iterator[Generator]:
    generator = started(base)
    yield generator
    generator.close()


def check(generator: Generator, alone: dict, names: list[str | None]) -> None:
    """Every prompt with each of these, all at once."""
    requests = [(prompt, GREEDY, name) for prompt in prompts(4, 30) for name in names]
    for at, answer in enumerate(answers(generator, requests)):
        name = names[at % len(names)]
        assert answer.ids == alone[name][at // len(names)], name


@pytest.mark.parametrize(
    "names", [["one", "two"], ["one", "dora"], ["two", "head"], ["ia3"], ["dora"], ["parameters"]], ids=" ".join
)
def test_adapters_in_one_batch_are_each_what_peft_alone_gives(
    base: Path, folders: dict[str, Path], alone: dict, names: list[str]
) -> None:
    generator = started(base, {name: folders[name] for name in names})
    try:
        assert generator.adapters == tuple(names)
        check(generator, alone, [None, *names])
        check(generator, alone, [None])
        check(generator, alone, names[-1:])
    finally:
        generator.close()


def test_loaded_and_unloaded_while_others_generate(generator: Generator, folders: dict[str, Path], alone: dict) -> None:
    long = Sampling(temperature=0, max_tokens=400, ignore_eos=True)

    async def meanwhile() -> tuple[list[int], list[int]]:
        free = asyncio.create_task(asked(generator, prompts(4, 30)[1], long))
        await generator.load_adapter("one", str(folders["one"]))
        assert not free.done()
        adapted = asyncio.create_task(asked(generator, prompts(4, 30)[1], GREEDY, "one"))
        await asyncio.sleep(0)  # it is submitted
        unloading = asyncio.create_task(generator.unload_adapter("one"))
        while generator.adapters:
            await asyncio.sleep(0.001)
        with pytest.raises(KeyError):
            generator.submit([5], GREEDY, "one")
        await unloading
        assert adapted.done()  # it was waited for
        await generator.load_adapter("one", str(folders["two"]))
        again = await asked(generator, prompts(4, 30)[1], GREEDY, "one")
        assert again.ids == alone["two"][1]
        await generator.unload_adapter("one")
        return (await free).ids, adapted.result().ids

    free, adapted = asyncio.run(meanwhile())
    assert adapted == alone["one"][1]
    assert free[:12] == alone[None][1]
    check(generator, alone, [None])
    assert not [name for name, _ in generator._loaded.model.named_modules() if "lora" in name]
    with pytest.raises(KeyError):
        asyncio.run(generator.unload_adapter("one"))


def test_an_adapter_that_goes_while_it_is_asked_for_is_not_stood_in_for(
    generator: Generator, folders: dict[str, Path], alone: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own answer is not given, nor is what it computed taken for a later adapter's of this name."""
    draws, prompt = generator._draws, prompts(4, 30)[1] * 3

    def meanwhile(seed: int | None) -> torch.Generator:
        monkeypatch.undo()
        unloading = threading.Thread(target=lambda: asyncio.run(generator.unload_adapter("one")))
        unloading.start()
        unloading.join()
        return draws(seed)

    async def conversation() -> list[int]:
        await generator.load_adapter("one", str(folders["one"]))
        monkeypatch.setattr(generator, "_draws", meanwhile)
        with pytest.raises(RequestFailed, match="'one' has been unloaded"):
            await asked(generator, prompt, GREEDY, "one")
        await generator.load_adapter("one", str(folders["two"]))
        again = (await asked(generator, prompt, GREEDY, "one")).ids
        await generator.unload_adapter("one")
        return again

    again = asyncio.run(conversation())
    asyncio.run(generator.load_adapter("other", str(folders["two"])))
    assert again == answers(generator, [(prompt, GREEDY, "other")])[0].ids
    asyncio.run(generator.unload_adapter("other"))


def test_a_caller_that_leaves_breaks_nothing(generator: Generator, folders: dict[str, Path], alone: dict) -> None:
    """Its task is cancelled before, while and after the engine's thread does what it asked."""
    long = Sampling(temperature=0, max_tokens=150, ignore_eos=True)

    async def left() -> None:
        for _ in range(3):
            loading = asyncio.create_task(generator.load_adapter("one", str(folders["one"])))
            await asyncio.sleep(0.01)
            loading.cancel()
            await asyncio.wait([loading])
            while "one" not in generator.adapters:
                with contextlib.suppress(JobError):
                    await generator.load_adapter("one", str(folders["one"]))
            using = asyncio.create_task(asked(generator, prompts(4, 30)[1], long, "one"))
            await asyncio.sleep(0)
            unloading = asyncio.create_task(generator.unload_adapter("one"))
            while generator.adapters:
                await asyncio.sleep(0.001)
            unloading.cancel()
            assert (await using).ids[:12] == alone["one"][1]
            await generator._call(lambda: None)
            assert not generator._adapters._mixable

    asyncio.run(left())
    check(generator, alone, [None])


def test_names_that_are_part_of_peft_s_own(base: Path, folders: dict[str, Path], alone: dict) -> None:
    generator = started(base, {"a": folders["one"], "lora": folders["two"], "org/some.name": folders["dora"]})
    try:
        named = {"a": alone["one"], "lora": alone["two"], "org/some.name": alone["dora"]}
        check(generator, named, list(named))
    finally:
        generator.close()


def test_no_more_adapters_in_a_batch_than_max_loras(base: Path, folders: dict[str, Path], alone: dict) -> None:
    generator = started(base, {name: folders[name] for name in ("one", "two")}, max_loras=1)
    seen = []
    groups = generator._adapters.calls
    generator._scheduler._calls = lambda rows: (seen.append(set(rows) - {None}), groups(rows))[1]
    try:
        check(generator, alone, ["one", "two", None])
        assert seen and max(map(len, seen)) == 1
        assert set().union(*seen) == {"one", "two"}
    finally:
        generator.close()


def _changed(folder: Path, target: Path, **values: object) -> Path:
    target.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (target / file).write_bytes((folder / file).read_bytes())
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**config, **values}))
    return target


def test_what_cannot_be_loaded_leaves_the_model_as_it_was(
    generator: Generator, folders: dict[str, Path], alone: dict, tmp_path: Path
) -> None:
    weights = safetensors.torch.load_file(folders["one"] / "adapter_model.safetensors")
    wide = _changed(folders["one"], tmp_path / "wide")
    safetensors.torch.save_file(
        {k: torch.zeros(4, 99) if "lora_A" in k else v for k, v in weights.items()}, wide / "adapter_model.safetensors"
    )
    lacking = _changed(folders["one"], tmp_path / "lacking")
    safetensors.torch.save_file(dict(list(weights.items())[2:]), lacking / "adapter_model.safetensors")
    more = _changed(folders["one"], tmp_path / "more")
    safetensors.torch.save_file({**weights, "base_model.model.x": torch.ones(1)}, more / "adapter_model.safetensors")
    empty = tmp_path / "empty"
    empty.mkdir()
    wrong = {
        "does not fit": [wide, lacking, more, _changed(folders["one"], tmp_path / "t", target_modules=["nowhere"])],
        "has no adapter_config": [empty, tmp_path / "absent"],
        "rank 128": [_changed(folders["one"], tmp_path / "r", r=128)],
        "biases or layers": [_changed(folders["one"], tmp_path / "b", bias="all")],
        "PREFIX_TUNING": [_changed(folders["one"], tmp_path / "p", peft_type="PREFIX_TUNING")],
    }
    for loaded in ((), ("two",)):  # alone, and beside one that works
        for name in loaded:
            asyncio.run(generator.load_adapter(name, str(folders[name])))
        for message, paths in wrong.items():
            for path in paths:
                with pytest.raises(JobError, match=message):
                    asyncio.run(generator.load_adapter("bad", str(path)))
        assert generator.adapters == loaded
        check(generator, alone, [None, *loaded])
    for name in ("two", ""):
        with pytest.raises(JobError):
            asyncio.run(generator.load_adapter(name, str(folders["one"])))
    with pytest.raises(JobError, match="does not fit"):  # PEFT holds one method at a time
        asyncio.run(generator.load_adapter("ia3", str(folders["ia3"])))
    check(generator, alone, [None, "two"])


def test_none_where_there_are_none(base: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(JobError, match="max_loras"):
        started(base, {"one": folders["one"]}, max_loras=0)
