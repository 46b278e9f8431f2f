"""train.compile: layers compiled one by one compute what they do without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ranks
import torch
from sft_runs import LORA, Runs, curve

from swift_dist.engines.hf import attention
from swift_dist.engines.hf.model import compile_layers

FSDP: dict[str, Any] = {"fsdp": "fsdp2"}


@pytest.fixture
def dynamo() -> Iterator[Any]:
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    yield dynamo
    dynamo.reset()
    attention.register()


def test_a_layer_is_compiled_once_for_all_numbers_of_sequences(dynamo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two layers, with lengths that change, and numbers of sequences beyond Dynamo's limit of programs."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **given: compile(module, backend="eager", **given))
    attention.register(is_compiled=True)
    plain, compiled = ranks.tiny(), ranks.tiny()
    for model in (plain, compiled):
        model.set_attn_implementation(attention.NAME)
    compile_layers(compiled)
    programs = []
    for number in range(1, 12):
        lengths = [2 + (number * k) % 5 for k in range(1, number + 1)]
        arguments = {
            "input_ids": torch.arange(sum(lengths))[None] % 90 + 3,
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            **attention.boundaries(lengths, torch.device("cpu")),
        }
        for model in (plain, compiled):
            model(**arguments, use_cache=False).logits.square().mean().backward()
        programs.append(dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < programs[0] <= 6
    assert programs[-1] == programs[1]
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=0, atol=1e-6)


@pytest.mark.table
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (1, {"train": {"recompute": "full"}}),
        (2, {"data": {"padding_free": False}}),
        (2, {"strategy": FSDP}),
        (2, {"strategy": FSDP, "tuner": LORA, "train": {"recompute": "full"}}),
        (2, {"strategy": {"deepspeed": "zero3"}, "tuner": LORA}),
    ],
    ids=["ddp", "ddp padded", "fsdp2", "fsdp2 lora", "zero3 lora"],
)
def test_compiled_runs_have_the_same_losses(gang: Any, tmp_path: Any, world: int, changes: dict[str, Any]) -> None:
    runs = Runs(gang, tmp_path)
    train = changes.get("train", {})
    plain = curve(runs.run(runs.job(**changes), world)[0])
    compiled = curve(runs.run(runs.job(**{**changes, "train": {**train, "compile": True}}), world, seconds=900)[0])
    for got, wanted in zip(compiled, plain, strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
