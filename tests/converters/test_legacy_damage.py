"""What is wrong with a legacy checkpoint is found when it is opened, and named; nothing in it is run."""

from __future__ import annotations

import os
import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swift_dist.converters.legacy_io import LegacyCheckpoint, LegacySide, check_legacy
from swift_dist.errors import JobError
from tests.converters import legacy_cases as cases

files, model = cases.files, cases.model
Cut, change, opened = cases.Cut, cases.change, cases.opened


class Evil:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"mkdir {self.path}",)


def test_nothing_that_a_file_names_is_run(model: Callable[[str], Any], tmp_path: Path) -> None:
    found = model("llama")
    folder = files.write(tmp_path, found.hf, found.tensors, Cut())
    trap = tmp_path / "trap"
    path = folder / "mp_rank_00" / "model_optim_rng.pt"
    change(path, lambda content: content.update(rerun_state_machine=Evil(trap)))
    opened(folder, found)
    path.write_bytes(pickle.dumps(Evil(trap)))
    with pytest.raises(JobError, match="not a whole file of torch"):
        LegacyCheckpoint(folder)
    torch.save(Evil(trap), path)
    with pytest.raises(JobError, match=r"holds no dict but .*system"):
        LegacyCheckpoint(folder)
    assert not trap.exists()


MODEL_FILE = "model_optim_rng.pt"
DAMAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a rank's folder is gone": (r"mp_rank_01_001/.* is missing", lambda f: shutil.rmtree(f / "mp_rank_01_001")),
    "all of a tensor rank": (
        r"mp_rank_01_000/.* is missing",
        lambda f: [shutil.rmtree(f / f"mp_rank_01_00{rank}") for rank in (0, 1)],
    ),
    "a file is gone": (r"mp_rank_01_000/.* is missing", lambda f: (f / "mp_rank_01_000" / MODEL_FILE).unlink()),
    "a file is cut": (
        r"mp_rank_00_001/.* cannot be read: not a whole file",
        lambda f: os.truncate(f / "mp_rank_00_001" / MODEL_FILE, 30000),
    ),
    "a file is empty": ("cannot be read", lambda f: os.truncate(f / "mp_rank_00_000" / MODEL_FILE, 0)),
    "another layout's file": (
        "mixes files of different layouts",
        lambda f: shutil.copytree(f / "mp_rank_00_000", f / "mp_rank_00"),
    ),
    "one rank too many": (
        "says|say",
        lambda f: shutil.copytree(f / "mp_rank_01_000", f / "mp_rank_02_000"),
    ),
    "another iteration": (
        "mp_rank_01_001 is of iteration 99, others of 100",
        lambda f: change(f / "mp_rank_01_001" / MODEL_FILE, lambda content: content.update(iteration=99)),
    ),
    "no state dict": (
        "holds no model but",
        lambda f: change(f / "mp_rank_00_000" / MODEL_FILE, lambda content: content.pop("model")),
    ),
    "megatron-legacy's model": (
        "language_model.encoder",
        lambda f: change(
            f / "mp_rank_00_000" / MODEL_FILE,
            lambda content: content.update(model={"language_model": {"encoder": {}}}),
        ),
    ),
    "GroupedMLP": (
        r"weight1 is GroupedMLP's",
        lambda f: change(
            f / "mp_rank_00_000" / MODEL_FILE,
            lambda content: content["model"].update({"decoder.layers.0.mlp.experts.weight1": torch.ones(2, 2)}),
        ),
    ),
    "an old order of rows": (
        "checkpoint_version is 1.0",
        lambda f: change(f / "mp_rank_00_000" / MODEL_FILE, lambda content: content.update(checkpoint_version=1.0)),
    ),
    "a shape": (
        r"mp_rank_01_000/decoder.layers.1.mlp.linear_fc2.weight: shape \[3, 3\]",
        lambda f: change(
            f / "mp_rank_01_000" / MODEL_FILE,
            lambda content: content["model"].update({"decoder.layers.1.mlp.linear_fc2.weight": torch.ones(3, 3)}),
        ),
    ),
    "a missing copy": (
        r"missing: mp_rank_01_001/decoder.final_layernorm.weight",
        lambda f: change(
            f / "mp_rank_01_001" / MODEL_FILE, lambda content: content["model"].pop("decoder.final_layernorm.weight")
        ),
    ),
    "an unknown weight": (
        r"mapped by no row: mp_rank_00_001/decoder.layers.0.adapter.weight",
        lambda f: change(
            f / "mp_rank_00_001" / MODEL_FILE,
            lambda content: content["model"].update({"decoder.layers.0.adapter.weight": torch.ones(3, 3)}),
        ),
    ),
    "a layer": (
        "lacks a layer",
        lambda f: change(
            f / "mp_rank_00_001" / MODEL_FILE,
            lambda content: [
                content["model"].pop(key) for key in list(content["model"]) if key.startswith("decoder.layers.0.")
            ],
        ),
    ),
    "a quantised tensor": (
        "is no plain tensor but",
        lambda f: change(
            f / "mp_rank_00_001" / MODEL_FILE,
            lambda content: content["model"].update({"output_layer.weight": Namespace()}),
        ),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_with_a_checkpoint_is_named(damage: str, model: Callable[[str], Any], tmp_path: Path) -> None:
    found = model("llama")
    folder = files.write(tmp_path, found.hf, found.tensors, Cut(tp=2, pp=2, stages=(2, 2)))
    message, spoil = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(JobError, match=message) as caught:
        opened(folder, found)
    assert caught.value.key == "source"


def test_another_model_than_the_config_says(model: Callable[[str], Any], tmp_path: Path) -> None:
    found = model("llama")
    checkpoint = LegacyCheckpoint(files.write(tmp_path, found.hf, found.tensors, Cut(pp=2, stages=(2, 2))))
    with pytest.raises(JobError, match=r"has 4 layers \(2 \+ 2\), its config 5"):
        LegacySide(checkpoint, 5)
    larger = found.family.rows({**found.hf, "vocab_size": 200})
    with pytest.raises(JobError, match=r"embedding\.word_embeddings\.weight has 200 rows"):
        check_legacy(LegacySide(checkpoint, 4), larger)
