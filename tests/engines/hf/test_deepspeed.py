"""Strategy deepspeed on two gloo ranks, beside one process and torch's own AdamW."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed_ranks
import pytest
import torch
from gang import Gang

RANKS = Path(__file__).with_name("deepspeed_ranks.py")
PRESETS = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def ranks() -> Iterator[Gang]:
    """With DeepSpeed imported once, before ranks are forked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "DS_ACCELERATOR", "cpu"
        )  # found by itself, it says so on the standard output of the forking process
        found = Gang(imports=deepspeed_ranks.IMPORTS)
    yield found
    found.close()


@cache
def alone(half: bool) -> Any:
    return deepspeed_ranks.alone(half)


def check_like_one_process(found: dict[str, Any], half: bool, tolerance: float = TOLERANCE) -> None:
    numbers, weights = alone(half)
    torch.testing.assert_close(torch.tensor(found["numbers"]), torch.tensor(numbers), rtol=tolerance, atol=tolerance)
    assert found["weights"].keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(found["weights"][name].float(), weight, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("half", [False, True], ids=["all learn", "some learn"])
def test_every_preset_trains_as_one_process_does(ranks, half):
    """Loss, gradient norm and weights of five steps, each of two micro-batches a rank; steps that were dropped leave no
    trace; nor does a preset in the next one's process."""
    cases = [{"deepspeed": name, "half": half} for name in PRESETS]
    first, second = ranks.run(RANKS, "train", 2, cases=cases)
    for name, found, other in zip(PRESETS, first, second, strict=True):
        check_like_one_process(found, half)
        assert found["numbers"][0][1] > deepspeed_ranks.CLIP  # it is clipped
        assert found["clean"] and other["clean"], name
        assert other["weights"] == {}
        assert other["numbers"] == found["numbers"]
    whole = sum(weight.numel() for weight in alone(half)[1].values()) * 4
    learning = sum(p.numel() for p in deepspeed_ranks.model(half).parameters() if p.requires_grad) * 4
    assert_held(dict(zip(PRESETS, first, strict=True)), whole, learning)


def assert_held(found: dict[str, Any], whole: int, learning: int) -> None:
    """What a rank holds of `whole` bytes of fp32 weights, `learning` of which learn."""

    def near(value: int, wanted: float) -> None:
        assert value == pytest.approx(wanted, rel=0.03), (value, wanted)

    for name, case in found.items():
        held, stage = case["held"], int(name[4])
        near(held["parameters"], whole / 2 if stage == 3 else whole)
        near(held["optimizer"], learning * (2 if stage == 0 else 1.5))  # moments, and from stage 1 on masters
        # with offload, ZeRO-3 keeps them where they add up and where the update reads them
        near(held["gradients"], learning * (1 if stage < 2 or name == "zero3_offload" else 0.5))
    kinds = [case["optimizer"] for case in found.values()]
    stage_3 = "DeepSpeedZeroOptimizer_Stage3"
    assert kinds == ["AdamW", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer", stage_3, kinds[2], stage_3]


def test_checkpoints_go_on_with_other_ranks_and_stages(ranks, tmp_path):
    """Two steps beyond a checkpoint are those of a run that was never interrupted."""
    numbers, _ = deepspeed_ranks.alone(steps=4)
    of_half, _ = deepspeed_ranks.alone(half=True, steps=4)

    def folder(name: str) -> str:
        return str(tmp_path / name)

    saves = [
        {"deepspeed": "zero3", "folder": folder("3")},
        {"deepspeed": "zero2_offload", "folder": folder("2")},
        {"deepspeed": "zero0", "folder": folder("0")},
        {"deepspeed": "zero3_offload", "folder": folder("half"), "half": True},
    ]
    for found, save in zip(ranks.run(RANKS, "save", 2, saves=saves, steps=2)[0], saves, strict=True):
        close(found, of_half if save.get("half") else numbers)
    on_one = [
        {"deepspeed": "zero3", "folder": folder("3")},
        {"deepspeed": "zero2", "folder": folder("half"), "half": True},
    ]
    on_two = [
        {"deepspeed": "zero0", "folder": folder("3")},
        {"deepspeed": "zero1", "folder": folder("3")},
        {"deepspeed": "zero3", "folder": folder("2")},
        {"deepspeed": "zero3_offload", "folder": folder("0")},
    ]
    for world, cases in ((1, on_one), (2, on_two)):
        for (found, _), case in zip(ranks.run(RANKS, "resume", world, cases=cases, steps=2)[0], cases, strict=True):
            close(found, (of_half if case.get("half") else numbers)[2:])


def close(found: list[tuple[float, float]], wanted: list[tuple[float, float]]) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=TOLERANCE, atol=TOLERANCE)
