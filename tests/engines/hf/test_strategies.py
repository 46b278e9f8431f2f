"""Strategies ddp and fsdp2 on gloo ranks give what plain torch gives in one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import strategy_ranks as by_rank
import torch

from swift_dist.config import JobConfig
from swift_dist.errors import JobError
from swift_dist.resolve import resolve

RANKS = Path(by_rank.__file__)
STEPS = 5
DDP: dict[str, Any] = {"strategy": {}}
FSDP: dict[str, Any] = {"strategy": {"fsdp": "fsdp2"}}


def compare(found: list[Any], case: dict[str, Any], tolerance: float = 1e-5) -> None:
    numbers, weights = by_rank.alone(case, len(found[0][0]))
    for got, _, _ in found:
        assert torch.allclose(torch.tensor(got), torch.tensor(numbers), rtol=0, atol=tolerance), (got, numbers)
    got = found[0][1]
    assert got.keys() == weights.keys()
    for name, weight in weights.items():
        assert (got[name] - weight).abs().max() <= tolerance, name


CASES = {
    "full": {},
    "tied": {"family": "qwen2", "config": {"tie_word_embeddings": True}},
    "some": {"family": "qwen2", "learns": "some"},
    "lora": {"learns": "lora"},
    "recompute": {"recompute": True},
    "moves": {"moves": True},
    "skips": {"skips": True, "learns": "some"},
}
"""What learns, and what else happens on the way. "moves": one layer at a time; "skips": gradients that are dropped."""


@pytest.mark.parametrize("strategy", [DDP, FSDP], ids=["ddp", "fsdp2"])
def test_two_ranks_train_as_one_process_does(gang: Any, strategy: dict[str, Any]) -> None:
    cases = [{**case, "job": strategy} for case in CASES.values()]
    if strategy is FSDP:  # gradients scattered in every micro-batch
        cases += [{**case, "whole_gradients": 0} for case in (cases[0], cases[-1])]
    found = gang.run(RANKS, "train", 2, cases=cases, steps=STEPS)
    for case, *by_case in zip(cases, *found, strict=True):
        compare(by_case, case)


def test_four_ranks_shard_in_pairs_and_offloaded(gang: Any) -> None:
    """HSDP; and shards of which some are empty, on the host."""
    cases = [
        {"job": {"strategy": {"fsdp": "fsdp2", "hybrid_shard_size": 2}}},
        {"learns": "lora", "job": {"strategy": {"fsdp": "fsdp2", "cpu_offload": True}}},
        {"config": {"num_hidden_layers": 1}, "job": {"strategy": {"fsdp": "fsdp2", "reshard_after_forward": False}}},
    ]
    found = gang.run(RANKS, "train", 4, cases=cases, steps=3)
    for case, *by_case in zip(cases, *found, strict=True):
        compare(by_case, case)


OTHERS: list[tuple[dict[str, Any], list[tuple[int, dict[str, Any]]]]] = [
    (DDP, [(4, FSDP), (1, {"strategy": {"fsdp": "fsdp2", "cpu_offload": True}})]),
    (FSDP, [(1, DDP), (4, {"strategy": {"fsdp": "fsdp2", "hybrid_shard_size": 2}})]),
]


@pytest.mark.parametrize(("saved_by", "others"), OTHERS, ids=["ddp", "fsdp2"])
def test_a_run_goes_on_under_other_ranks_and_the_other_strategy(
    gang: Any, tmp_path: Path, saved_by: dict[str, Any], others: list[tuple[int, dict[str, Any]]]
) -> None:
    cases = [{"family": "qwen2"}, {"learns": "lora"}, {"moves": True}]
    places = {"folder": str(tmp_path), "saved_at": 2, "steps": 4}
    straight = gang.run(RANKS, "save", 2, cases=[{**case, "job": saved_by} for case in cases], **places)[0]
    assert all("lora" in key for key in straight[1][1]), "a base is not saved with its adapter"
    for world, strategy in others:
        resumed = [{**case, "job": strategy} for case in cases]
        for rank in gang.run(RANKS, "resume", world, cases=resumed, **places):
            for got, (expected, _), case in zip(rank, straight, cases, strict=True):
                assert torch.allclose(torch.tensor(got), torch.tensor(expected), rtol=0, atol=1e-5), (case, strategy)


def test_a_rank_holds_its_share(gang: Any) -> None:
    case = {"config": {"vocab_size": 96}}
    cases = [{**case, "job": strategy} for strategy in (DDP, FSDP, FSDP)]
    cases[2] = {**cases[2], "whole_gradients": 0}
    whole, sharded, scattered = (held for _, _, held in gang.run(RANKS, "train", 2, cases=cases, steps=1)[1])
    assert whole["optimizer"] == pytest.approx(2 * whole["parameters"], rel=0.01)
    for name in ("parameters", "optimizer"):
        assert sharded[name] == pytest.approx(whole[name] / 2, rel=0.02)
    assert scattered["gradients"] == pytest.approx(whole["gradients"] / 2, rel=0.02)
    assert sharded["gradients"] == pytest.approx(whole["gradients"], rel=0.02), "kept whole between micro-batches"


def test_an_overflow_in_fp16_halves_the_scale(gang: Any) -> None:
    train = {"precision": "fp16", "initial_loss_scale": 2.0**10}
    cases = [{"learns": "some", "job": {**strategy, "train": train}} for strategy in (DDP, FSDP)]
    found = gang.run(RANKS, "overflow", 2, cases=cases)
    norm = by_rank.alone({"learns": "some", "job": DDP}, 1)[0][0][1]
    for rank in found:
        for result in rank:
            assert not math.isfinite(result["norm"])
            assert result["unchanged"]
            assert result["scales"][:2] == [2.0**10, 2.0**9]
            assert result["good"] == pytest.approx(norm, rel=0.01), "unscaled"
    assert found[0][0]["moved"] > 0


def test_half_precision_is_near_and_masters_are_not_in_it(gang: Any) -> None:
    case = {"learns": "lora"}
    cases = [{**case, "job": {**strategy, "train": {"precision": "bf16"}}} for strategy in (DDP, FSDP)]
    expected = by_rank.alone({**case, "job": DDP}, 2)[0]
    for rank in gang.run(RANKS, "half_precision", 2, cases=cases, dtype="bfloat16"):
        for numbers, dtypes in rank:
            assert dtypes == {"torch.float32"}
            assert torch.allclose(torch.tensor(numbers), torch.tensor(expected), rtol=0.02, atol=0)
            assert numbers != expected


def test_weights_that_a_rank_or_no_rank_uses(gang: Any) -> None:
    jobs = [DDP, FSDP]
    found = gang.run(RANKS, "use_other_weights", 2, jobs=jobs)[0]
    expected = by_rank.use_other_weights_alone(DDP, 2)
    for weights in found:
        for name, weight in expected.items():
            assert (weights[name] - weight).abs().max() <= 1e-6, name
    assert torch.equal(found[1]["none.weight"], by_rank.Towers().state_dict()["none.weight"]), "not even decayed"


def test_a_frozen_model_is_sharded_too(gang: Any) -> None:
    for off, held, whole in gang.run(RANKS, "frozen", 2):
        assert off <= 1e-5
        assert held == pytest.approx(whole / 2, rel=0.02)


@pytest.mark.parametrize("strategy", [DDP, FSDP], ids=["ddp", "fsdp2"])
def test_a_dead_peer_is_noticed_and_left(gang: Any, strategy: dict[str, Any]) -> None:
    *found, killed = gang.run(RANKS, "lose_a_peer", 4, settings=strategy)
    assert killed is None
    expected = by_rank.alone({"job": strategy}, 1)[0]
    assert all(result["seconds"] < 30 for result in found), "no timeout was waited for"
    for result in found[:2]:
        assert torch.allclose(torch.tensor(result["numbers"]), torch.tensor(expected), rtol=0, atol=1e-5)


def test_what_cannot_be_right_is_refused(gang: Any) -> None:
    muon = gang.run(RANKS, "refused", 1, settings={**FSDP, "optimizer": {"name": "muon"}})[0]
    assert "whole matrices" in muon


def test_shards_that_do_not_fit_the_ranks_are_refused_before_anything_starts() -> None:
    strategy = {"fsdp": "fsdp2", "hybrid_shard_size": 3}
    wanted = JobConfig.model_validate(
        {"task": "sft", "model": {"config": {"model_type": "llama"}}, "strategy": strategy}
    )
    with pytest.raises(JobError, match="hybrid_shard_size: 3 does not divide the 4 ranks"):
        resolve(wanted, nproc_per_node=4, on_cuda=False, output="/nowhere")
