"""Weights that only the first rank reads are, on every rank, those that each would have read itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chat_model
import first_rank_ranks as by_rank
import pytest
import torch

RANKS = Path(by_rank.__file__)
FSDP: dict[str, Any] = {"strategy": {"fsdp": "fsdp2"}}
PISSA = {"name": ["lora"], "lora": {"rank": 4, "init": "pissa", "use_dora": True}}

CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "bf16": {"train": {"precision": "bf16"}},
    "lora": {"tuner": {"name": ["lora"], "trainable": ["lm_head.weight"]}, "train": {"precision": "bf16"}},
    "pissa": {"tuner": PISSA},
    "olora": {"tuner": {"name": ["lora"], "lora": {"rank": 4, "init": "olora"}}},
    "llama_pro": {"tuner": {"name": ["llama_pro"], "llama_pro": {"blocks": 1}}},
    "ia3": {"tuner": {"name": ["ia3", "neftune"]}},
    "random": {"model": {"init": "random"}},
    "labels": {"objective": {"name": "classification"}, "model": {"num_labels": 3}},
    "reference": {"task": "rlhf", "objective": {"name": "dpo"}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    tied = {
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    }
    return {
        "plain": str(chat_model.save_chat_model(folder / "plain")),
        "tied": str(chat_model.save_chat_model(folder / "tied", **tied)),
    }


def compare(alone: list[dict[str, Any]], by_all: list[dict[str, Any]]) -> None:
    for got, wanted in zip(alone, by_all, strict=True):
        assert got["learns"] == wanted["learns"] and got["objects"] == wanted["objects"]
        assert torch.equal(got["logits"], wanted["logits"])
        for part in ("weights", "buffers", "tuners", "pieces"):
            assert got[part].keys() == wanted[part].keys(), part
            for name, tensor in wanted[part].items():
                assert got[part][name].dtype == tensor.dtype
                assert torch.equal(got[part][name], tensor), (part, name)


def check(gang: Any, models: dict[str, str], cases: list[dict[str, Any]]) -> None:
    given = [{"model": models["plain"], "settings": case} for case in cases]
    given += [{"model": models["tied"], "settings": case} for case in cases[:1]]
    alone, by_all = (gang.run(RANKS, "built", 2, 400, cases=given, alone=alone) for alone in (True, False))
    for got, wanted in zip(alone, by_all, strict=True):
        compare(got, wanted)
    assert alone[0][0]["weights"] and not alone[1][0]["weights"], "whole weights are on the first rank only"


def test_ranks_hold_what_they_would_have_read(gang: Any, models: dict[str, str]) -> None:
    check(gang, models, [{**case, **FSDP} for case in CASES.values()])


def test_tensors_of_every_kind_arrive(gang: Any) -> None:
    (is_one, first), (is_one_too, second) = gang.run(RANKS, "handed_out", 2)
    assert is_one and is_one_too
    assert first.keys() == second.keys() == {"weight", "rounded", "scalar", "none", "mask", "kept"}
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


def test_an_error_of_one_rank_is_that_of_all(gang: Any) -> None:
    for rank in (0, 1):
        found = gang.run(RANKS, "failing", 2, rank=rank, kind="job")
        assert found[0] == found[1] and found[0].startswith("JobError: model.path: is broken")
    failed, told = gang.run(RANKS, "failing", 2, rank=0, kind="other")
    assert failed == "OSError: no disk"
    assert told == "RunError: rank 0: OSError: no disk"


def test_models_that_differ_are_refused(gang: Any) -> None:
    assert all("ranks made different models" in message for message in gang.run(RANKS, "different", 2))
