"""model.kernels and model.liger: which one is used, and runs that compute the same with ours."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from sft_runs import LORA, Runs, curve

from swift_dist.config import JobConfig
from swift_dist.engines.hf import model_kernels, tiled_mlp
from swift_dist.errors import JobError
from swift_dist.kernels import slots
from swift_dist.resolve import resolve

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def job(**sections: Any) -> JobConfig:
    return JobConfig.model_validate({"task": "sft", "engine": "hf", **sections})


@pytest.mark.parametrize(
    ("device", "has_liger", "liger", "kernels", "expected"),
    [
        (CPU, True, None, False, "none"),
        (CPU, True, None, True, "ours"),
        (CUDA, True, None, False, "liger"),
        (CUDA, True, None, True, "ours"),  # asked for, which Liger's are not
        (CUDA, True, True, False, "liger"),
        (CUDA, True, False, False, "none"),
        (CUDA, False, None, True, "ours"),
        (CUDA, False, None, False, "none"),
        (CUDA, False, True, False, None),
        (CPU, True, True, False, None),
    ],
)
def test_which(
    device: torch.device,
    has_liger: bool,
    liger: bool | None,
    kernels: bool,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if has_liger else None)
    monkeypatch.setattr(model_kernels, "HAVE_TRITON", True)
    made = job(model={"liger": liger, "kernels": kernels})
    if expected is None:
        with pytest.raises(JobError, match="liger-kernel"):
            model_kernels.choose(made, device)
        return
    assert model_kernels.choose(made, device) == expected


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(model_kernels, "HAVE_TRITON", False)
    assert model_kernels.choose(job(), CUDA) == "none"
    assert model_kernels.choose(job(model={"kernels": True}), CPU) == "ours"
    with pytest.raises(JobError, match="triton"):
        model_kernels.choose(job(model={"kernels": True}), CUDA)


@pytest.mark.parametrize(
    ("sections", "message"),
    [({"model": {"liger": True, "kernels": True}}, "same parts"),
     ({"model": {"kernels": True}, "train": {"compile": True}}, "cannot be compiled")],
)  # fmt: skip
def test_both_are_refused(sections: dict[str, Any], message: str, tmp_path: Path) -> None:
    made = job(**sections)
    with pytest.raises(JobError, match=message) as error:
        resolve(made, nproc_per_node=1, on_cuda=True, output=str(tmp_path))
    assert error.value.key == "model.kernels"


def test_a_model_without_a_slot_is_refused() -> None:
    with pytest.raises(JobError, match="no part"):
        model_kernels.use(torch.nn.Sequential(torch.nn.Linear(2, 2)), job(model={"kernels": True}), CPU)


def test_tiles_of_an_mlp_are_of_kernels() -> None:
    import ranks

    model = ranks.tiny()
    filled = slots.install(model)
    assert tiled_mlp.install(model) == 2
    mlp = model.model.layers[0].mlp
    mine = next(place.method for place in filled if place.module is mlp)
    assert isinstance(mlp.forward, tiled_mlp.TiledMLP) and mlp.forward._whole is mine


@pytest.fixture(scope="module")
def runs(gang: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(gang, tmp_path_factory.mktemp("runs"))


TRAIN = {"recompute": "full", "tiled_mlp": True}
CASES: list[Any] = [
    (2, "sft", {"strategy": {"fsdp": "fsdp2"}, "tuner": LORA}),
    pytest.param(2, "sft", {"strategy": {"deepspeed": "zero3"}, "train": TRAIN}, marks=pytest.mark.table),
    pytest.param(2, "sft", {"strategy": {"fsdp": "fsdp2"}, "train": TRAIN}, marks=pytest.mark.table),
    pytest.param(1, "sft", {"train": {"precision": "bf16"}}, marks=pytest.mark.table),
    pytest.param(2, "rlhf", {"strategy": {"fsdp": "fsdp2"}}, marks=pytest.mark.table),
    pytest.param(2, "sft", {"parallel": {"context_parallel_size": 2}}, marks=pytest.mark.table),
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("world", "task", "changes"), CASES)
def test_runs_have_the_same_losses(runs: Runs, world: int, task: str, changes: dict[str, Any]) -> None:
    """On a CPU kernels compute in plain torch what the models' own code computes, to the bit."""
    plain = curve(runs.run(runs.job(task, **changes), world, seconds=400)[0])
    model = {"path": runs.model, "kernels": True}
    found = curve(runs.run(runs.job(task, **{**changes, "model": model}), world, seconds=400)[0])
    assert len(found) == 5
    for got, wanted in zip(found, plain, strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
