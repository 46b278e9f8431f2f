"""A step of the hf engine, exported a weight at a time: what the whole model would have written, bit for bit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from swift_dist.checkpoint.folder import Checkpoint
from swift_dist.config import JobConfig
from swift_dist.engines.hf import saved_step
from swift_dist.errors import RunError
from swift_dist.tuners import find_tuners
from swift_dist.tuners._stored import NotStreamed
from tests.tuners.tiny import tiny_folder

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "full": ("qwen2", {"name": "full"}, {"export_dtype": "bf16"}),
    "experts": ("mixtral", {"name": "full"}, {}),
    "freeze": ("mixtral", {"name": "freeze", "freeze": {"ratio": 0.5}}, {"export_dtype": "bf16"}),
    "lisa": ("llama", {"name": "lisa", "lisa": {"active_layers": 1}}, {}),
    "lora": ("llama", {"name": "lora", "trainable": ["lm_head"]}, {}),
}


def saved(folder: Path, base: Path, tuner: dict[str, Any], settings: dict[str, Any]) -> tuple[Checkpoint, JobConfig]:
    """A checkpoint of what learns, with other values than the base's."""
    job = JobConfig.model_validate(
        {"engine": "hf", "task": "sft", "model": {"path": str(base)}, "tuner": tuner, "checkpoint": settings}
    )
    checkpoint = Checkpoint(1, folder, {"engine": "hf"})
    model = saved_step._model(checkpoint, job, find_tuners(job.tuner), on_meta=False)
    generator = torch.Generator().manual_seed(5)
    learnt = {
        f"model.{name}": torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    dcp.save(learnt, checkpoint_id=folder, no_dist=True)
    torch.save({"engine": {"tuners": {}}}, folder / "common.pt")
    return checkpoint, job


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("case", CASES)
def test_every_bit_is_that_of_the_whole_model(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, tuner, settings = CASES[case]
    base = tiny_folder(tmp_path / "base", kind)
    checkpoint, job = saved(tmp_path / "step", base, tuner, settings)
    monkeypatch.setattr(saved_step, "_SHARD_BYTES", 20_000)
    ours = saved_step.export_checkpoint(checkpoint, job, tmp_path / "ours")
    assert "whole model" not in caplog.text
    assert case == "lora" or len(list(ours.glob("*.safetensors"))) > 1

    def refuse(*_: object) -> None:
        raise NotStreamed("as asked")

    monkeypatch.setattr(saved_step, "_require_no_values", refuse)
    with caplog.at_level(logging.WARNING):
        theirs = saved_step.export_checkpoint(checkpoint, job, tmp_path / "theirs")
    assert "the whole model is held in memory to export this checkpoint: as asked" in caplog.text
    a, b = tensors(ours), tensors(theirs)
    assert a.keys() == b.keys()
    assert all(a[name].dtype == value.dtype and torch.equal(a[name], value) for name, value in b.items())
    configs = [f.name for f in theirs.iterdir() if f.suffix == ".json" and "index" not in f.name]
    assert all((ours / name).read_text() == (theirs / name).read_text() for name in configs)


def test_a_checkpoint_with_a_torn_file_is_said(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", "llama")
    checkpoint, job = saved(tmp_path / "step", base, {"name": "full"}, {})
    file = next(checkpoint.path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(RunError, match="cannot be read") as caught:
        saved_step.export_checkpoint(checkpoint, job, tmp_path / "out")
    assert "Traceback" not in str(caught.value)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["base", "step"]
