"""Weights that only the first rank reads are, on every rank, those that each would have read itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chat_model
import first_rank_ranks as by_rank
import pytest
import torch

from swift_dist.engines.hf.strategies import _first_rank as first_rank

RANKS = Path(by_rank.__file__)
FSDP: dict[str, Any] = {"strategy": {"fsdp": "fsdp2"}}
ZERO_3: dict[str, Any] = {"strategy": {"deepspeed": "zero3"}}
LORA = {"name": ["lora"], "lora": {"rank": 4}, "trainable": ["lm_head.weight"]}
BF16 = {"precision": "bf16"}

CASES: dict[str, dict[str, Any]] = {
    "reference": {"task": "rlhf", "objective": {"name": "dpo"}, "train": BF16},
    "lora": {"tuner": LORA, "train": BF16},
    "pissa": {"tuner": {"name": ["lora"], "lora": {"rank": 4, "init": "pissa", "use_dora": True}}},
    "llama_pro": {"tuner": {"name": ["llama_pro"], "llama_pro": {"blocks": 1}}},
    "random": {"model": {"init": "random"}},
    "labels": {
        "objective": {"name": "classification"},
        "model": {"num_labels": 3},
        "tuner": {"name": ["ia3", "neftune"]},
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}  # further buffers that no file has
    return {
        "plain": str(chat_model.save_chat_model(folder / "plain")),
        "tied": str(chat_model.save_chat_model(folder / "tied", tie_word_embeddings=True, rope_parameters=rope)),
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


def check(deepspeed_gang: Any, models: dict[str, str], cases: list[dict[str, Any]]) -> None:
    given = [{"model": models["tied" if case.get("task") else "plain"], "settings": case} for case in cases]
    alone, by_all = (deepspeed_gang.run(RANKS, "built", 2, 400, cases=given, alone=alone) for alone in (True, False))
    for got, wanted in zip(alone, by_all, strict=True):
        compare(got, wanted)
    assert alone[0][0]["weights"] and not alone[1][0]["weights"], "whole weights are on the first rank only"


@pytest.mark.parametrize(
    ("strategy", "names"), [(FSDP, list(CASES)), (ZERO_3, ["reference", "pissa"])], ids=["fsdp2", "zero3"]
)
def test_ranks_hold_what_they_would_have_read(
    deepspeed_gang: Any, models: dict[str, str], strategy: dict[str, Any], names: list[str]
) -> None:
    """Bit for bit: weights, masters, buffers, a tuner's first factors, and what the model and its reference compute."""
    check(deepspeed_gang, models, [{**CASES[name], **strategy} for name in names])


def test_stage_3_shards_weights_whoever_wrote_the_file(tmp_path: Path) -> None:
    """A reference beside the model is sharded then, too."""
    file = tmp_path / "mine.json"
    for stage in (2, 3):
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        job = by_rank.job("x", {"strategy": {"deepspeed": str(file)}})
        assert first_rank.shards_weights(job) == (stage == 3)
    assert first_rank.shards_weights(by_rank.job("x", FSDP)) and not first_rank.shards_weights(by_rank.job("x", {}))


def test_tensors_of_every_kind_arrive(deepspeed_gang: Any) -> None:
    (is_one, first), (is_one_too, second) = deepspeed_gang.run(RANKS, "handed_out", 2)
    assert is_one and is_one_too
    assert first.keys() == second.keys() == {"weight", "rounded", "scalar", "none", "mask", "kept"}
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


def test_an_error_of_one_rank_is_that_of_all(deepspeed_gang: Any) -> None:
    for rank in (0, 1):
        found = deepspeed_gang.run(RANKS, "failing", 2, rank=rank, kind="job")
        assert found[0] == found[1] and found[0].startswith("JobError: model.path: is broken")
    failed, told = deepspeed_gang.run(RANKS, "failing", 2, rank=0, kind="other")
    assert failed == "OSError: no disk"
    assert told == "RunError: rank 0: OSError: no disk"


@pytest.mark.table
@pytest.mark.parametrize("strategy", [FSDP, ZERO_3], ids=["fsdp2", "zero3"])
def test_other_ranks_need_room_for_their_shards(
    deepspeed_gang: Any, tmp_path: Path, strategy: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Resident memory at the start beyond what stays, of a model whose weights are 104 MB in fp32, and whose largest
    tensor is 16 MB. (Read by all, a rank holds what is not sharded yet.)"""
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "vocab_size": 8000}
    chat_model.save_chat_model(tmp_path / "fp32", **sizes)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16)
    made.save_pretrained(tmp_path / "model")
    size = 4 * made.num_parameters()
    chat_model.save_chat_model(tmp_path / "tiny")
    places = {"model": str(tmp_path / "model"), "tiny": str(tmp_path / "tiny")}
    found = {
        alone: deepspeed_gang.run(RANKS, "start", 2, 400, settings=strategy, alone=alone, **places)
        for alone in (True, False)
    }
    with capsys.disabled():
        print(f"\n{strategy}: {size} bytes; read by the first rank: {found[True]}, by all: {found[False]}")
    beyond = {alone: ranks[1]["peak"] - ranks[1]["after"] for alone, ranks in found.items()}
    assert beyond[True] < 0.4 * size
    assert beyond[False] > 0.6 * size


def test_models_that_differ_are_refused(deepspeed_gang: Any) -> None:
    assert all("ranks made different models" in message for message in deepspeed_gang.run(RANKS, "different", 2))
