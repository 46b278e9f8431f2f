"""Strategy deepspeed on two gloo ranks, beside one process and torch's own AdamW."""

from __future__ import annotations

import math
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed_ranks
import pytest
import torch
from dist_tensors import dist_tensors
from gang import Gang

from swift_dist.checkpoint import newest_whole
from swift_dist.engines.hf.strategies import _deepspeed_config as configuration
from swift_dist.engines.hf.strategies._deepspeed_start import STALE_LOCK_SECONDS, clear_stale_locks

RANKS = Path(__file__).with_name("deepspeed_ranks.py")
PRESETS = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def ranks(deepspeed_gang: Gang) -> Gang:
    return deepspeed_gang


@cache
def alone(half: bool) -> Any:
    return deepspeed_ranks.alone(half)


def check_like_one_process(found: dict[str, Any], half: bool, tolerance: float = TOLERANCE) -> None:
    numbers, weights = alone(half)
    torch.testing.assert_close(torch.tensor(found["numbers"]), torch.tensor(numbers), rtol=tolerance, atol=tolerance)
    assert found["weights"].keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(found["weights"][name].float(), weight, rtol=0, atol=tolerance, msg=name)


@pytest.mark.slow
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


@pytest.mark.slow
def test_checkpoints_go_on_with_other_ranks_stages_and_strategies(ranks, tmp_path):
    """Two steps beyond a checkpoint are those of a run that was never interrupted."""
    numbers, _ = deepspeed_ranks.alone(steps=4)
    of_half, _ = deepspeed_ranks.alone(half=True, steps=4)

    def folder(name: str) -> str:
        return str(tmp_path / name)

    saves = [
        {"deepspeed": "zero3", "folder": folder("3")},
        {"deepspeed": "zero2_offload", "folder": folder("2")},
        {"deepspeed": "ddp", "folder": folder("ddp")},
        {"deepspeed": "zero3_offload", "folder": folder("half"), "half": True},
    ]
    for found, save in zip(ranks.run(RANKS, "save", 2, saves=saves, steps=2)[0], saves, strict=True):
        close(found, of_half if save.get("half") else numbers)
    on_one = [
        {"deepspeed": "zero3", "folder": folder("3")},
        {"deepspeed": "zero2", "folder": folder("half"), "half": True},
    ]
    on_two = [
        {"deepspeed": "ddp", "folder": folder("3")},
        {"deepspeed": "zero1", "folder": folder("3")},
        {"deepspeed": "zero0", "folder": folder("2")},
        {"deepspeed": "fsdp2", "folder": folder("2")},
        {"deepspeed": "zero3_offload", "folder": folder("ddp")},
    ]
    for world, cases in ((1, on_one), (2, on_two)):
        for (found, _), case in zip(ranks.run(RANKS, "resume", world, cases=cases, steps=2)[0], cases, strict=True):
            close(found, (of_half if case.get("half") else numbers)[2:])


@pytest.mark.slow
def test_checkpoints_of_bf16_hold_the_masters(ranks, tmp_path):
    """Bit for bit, whichever of DeepSpeed's optimizers takes them over; also one that computes in fp32."""
    cases = {
        "zero1": [("zero2_offload", "bf16"), ("zero3", "bf16")],
        "zero3_offload": [("zero1", "bf16"), ("zero2", "fp32")],
    }
    for name, others in cases.items():
        save = {"deepspeed": name, "precision": "bf16"}
        loads = [{"deepspeed": other, "precision": precision} for other, precision in others]
        computing, _ = ranks.run(RANKS, "masters", 2, folder=str(tmp_path / name), save=save, loads=loads)
        saved = tensors(tmp_path / name)
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
        assert len(saved) == 3 * len(alone(False)[1])
        for number, weights in enumerate(computing):
            again = tensors(tmp_path / f"{name}-{number}")
            assert again.keys() == saved.keys()
            assert all(torch.equal(again[key], tensor) for key, tensor in saved.items())
            assert all(torch.equal(t, saved[f"model.{key}"].to(t.dtype)) for key, t in weights.items())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = newest_whole(folder)
    assert checkpoint is not None
    return dist_tensors(checkpoint.path)


def test_bf16_stays_near(ranks):
    """Weights that a step moves by less than bf16 can show still move: masters are fp32, and begin as the model's own
    numbers instead of rounded ones."""
    names = ["zero0", "zero1", "zero2", "zero3"]
    found, _ = ranks.run(RANKS, "train", 2, cases=[{"deepspeed": n, "precision": "bf16"} for n in names])
    for name, case in zip(names, found, strict=True):
        check_like_one_process(case, False, tolerance=0.02)
        wanted = "AdamW" if name == "zero0" else "BF16_Optimizer" if name == "zero1" else "DeepSpeedZeroOptimizer"
        assert case["optimizer"].startswith(wanted), name


def test_an_fp16_overflow_is_skipped_and_lowers_the_scale(ranks):
    names = ["zero0", "zero1", "zero2_offload", "zero3"]
    wanted, _ = alone(False)
    for case in ranks.run(RANKS, "overflow", 2, presets=names)[0]:
        assert not any(math.isfinite(norm) for norm in case["norms"])
        assert case["scales"] == [256.0, 128.0, 64.0]
        assert case["same"]
        torch.testing.assert_close(torch.tensor(case["numbers"]), torch.tensor(wanted[:2]), rtol=0.02, atol=0.02)


def test_state_on_a_disk(ranks, tmp_path):
    """zero3_nvme, with DeepSpeed's asynchronous I/O (minutes to compile) replaced by plain files."""
    (tmp_path / "disk").mkdir()
    found = ranks.run(RANKS, "nvme", 2, folder=str(tmp_path / "disk"), save=str(tmp_path / "checkpoints"))[0]
    wanted, _ = alone(False)
    assert "round weights on NVMe to bf16" in found["refused"]  # where a device has no fp16, told nothing else
    assert found["files"] > 20
    close(found["numbers"], wanted[:4])
    close(found["again"], wanted[2:4])
    close(found["elsewhere"], wanted[2:4])


def test_weights_that_a_step_does_not_use(ranks):
    """Their gradient is 0, and not that of an earlier step, as DeepSpeed alone would have it."""
    alike = [[["l", ""]] * 2, [["", ""]] * 2, [["", "lr"]] * 2, [["r", ""]] * 2]
    differ = [[["l", ""], ["r", ""]], [["", ""], ["", "l"]], [["r", "l"], ["", "r"]]]
    for uses, names in ((alike, PRESETS), (differ, ["zero0", "zero1"])):
        wanted = deepspeed_ranks.towers_alone(uses)
        for name, found in zip(names, ranks.run(RANKS, "towers", 2, presets=names, uses=uses)[0], strict=True):
            for key, weight in wanted.items():
                torch.testing.assert_close(found[key], weight, rtol=0, atol=TOLERANCE, msg=f"{name} {key}")


def test_gradients_of_different_weights_are_not_added_up(ranks):
    """`left` on one rank and `right` on the other: DeepSpeed's buckets are of one size, and ZeRO-2 sums them."""
    for message in ranks.run(RANKS, "towers", 2, presets=["zero2"], uses=[[["l", "l"], ["r", "r"]]]):
        assert message[0].startswith("the ranks' rows used different weights")


def test_what_the_engine_relies_on(ranks):
    found = ranks.run(RANKS, "manners", 2)[0]
    assert found["modes"] == [False, False, True, True]
    assert found["eval"] == pytest.approx([found["wanted"]] * 2, rel=TOLERANCE)
    assert found["finite"]  # with activations recomputed
    assert found["freeze"].startswith("the weights that learn have changed")
    close(found["again"], alone(False)[0])  # a second group in the same process
    first, second = found["numbers"]  # a rank that stayed counts as one that is new
    assert first == second and len(set(first)) > 20


def test_only_locks_of_killed_builds_are_cleared(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    locks = [tmp_path / "py311_cpu" / name / "lock" for name in ("killed", "building")]
    for lock in locks:
        lock.parent.mkdir(parents=True)
        lock.touch()
    long_ago = time.time() - STALE_LOCK_SECONDS - 60
    os.utime(locks[0], (long_ago, long_ago))
    assert clear_stale_locks() == [locks[0]]
    assert [lock.exists() for lock in locks] == [False, True]


def test_known_keys_are_deepspeeds_own():
    """Every key that the check lets through is one of this version's configuration."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    sections = configuration.SECTION_KEYS
    for keys, section in (
        (configuration.ZERO_KEYS, DeepSpeedZeroConfig),
        (sections["zero_optimization.offload_optimizer"], DeepSpeedZeroOffloadOptimizerConfig),
        (sections["zero_optimization.offload_param"], DeepSpeedZeroOffloadParamConfig),
        (sections["fp16"], DeepSpeedFP16Config),
        (sections["bf16"], DeepSpeedBF16Config),
    ):
        known = {name for field, info in section.model_fields.items() for name in (field, info.alias)}
        assert keys <= known, keys - known


def close(found: list[tuple[float, float]], wanted: list[tuple[float, float]]) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=TOLERANCE, atol=TOLERANCE)
