"""The Megatron engine on gangs of plain processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import golden_cases as cases
import pytest

RANKS = Path(__file__).with_name("engine_ranks.py")
TINY = {**cases.MODELS["llama"], "num_hidden_layers": 2}
MOE = {**cases.MODELS["qwen3_moe"], "num_hidden_layers": 2}


def job(config: dict[str, Any] = TINY, train: dict[str, Any] | None = None, **parallel: Any) -> dict[str, Any]:
    made = cases.job("llama", "TP1", **(train or {}))
    made["model"]["config"] = config
    made["train"]["steps"] = 20
    made["parallel"] = parallel
    return made


def close(ours: list[Any], theirs: list[Any], tolerance: float) -> bool:
    flat = zip([x for pair in ours for x in pair], [x for pair in theirs for x in pair], strict=True)
    return all(math.isclose(a, b, rel_tol=tolerance) for a, b in flat)


def test_parameters_have_transformer_engine_names(gang: Any) -> None:
    (names,) = gang.run(RANKS, "parameter_names", 1, job=job(MOE))
    for name in ("self_attention.linear_qkv.layer_norm_weight", "pre_mlp_layernorm.weight", "mlp.router.weight"):
        assert f"decoder.layers.1.{name}" in names
    (names,) = gang.run(RANKS, "parameter_names", 1, job=job())
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in names
    assert not any("input_layernorm" in name or "pre_mlp_layernorm" in name for name in names)


@pytest.mark.parametrize(("model", "expected"), [("mistral", "all_gather"), ("llama", None)])
def test_a_window_under_context_parallelism_does_not_use_the_ring(gang: Any, model: str, expected: str | None) -> None:
    """No machine without a GPU can run it: transformer-engine refuses windows with its default, point to point."""
    assert gang.run(RANKS, "cp_comm_type", 1, job=job(cases.MODELS[model])) == [expected]


LAYOUTS = [
    (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    (2, {"pipeline_model_parallel_size": 2}),
    (2, {"context_parallel_size": 2}),
    (4, {"tensor_model_parallel_size": 4}),  # more ranks than key-value groups
]


@pytest.mark.parametrize(("world", "parallel"), LAYOUTS)
def test_the_same_seed_trains_the_same_on_any_layout(gang: Any, world: int, parallel: dict[str, Any]) -> None:
    (alone,) = gang.run(RANKS, "losses", 1, job=job(), steps=3)
    for ours in gang.run(RANKS, "losses", world, job=job(**parallel), steps=3):
        assert close(ours, alone, 1e-6)


def test_experts_start_alike_on_any_layout(gang: Any) -> None:
    (alone,) = gang.run(RANKS, "losses", 1, job=job(MOE), steps=2)
    for degrees in (
        {"expert_model_parallel_size": 2},
        {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
        {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    ):
        for ours in gang.run(RANKS, "losses", 2, job=job(MOE, **degrees), steps=2):
            assert close(ours, alone, 1e-6), degrees


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize(
    "degrees",
    [
        {"expert_tensor_parallel_size": 2},
        {"context_parallel_size": 2, "expert_tensor_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ],
)
def test_experts_split_otherwise_than_the_rest_without_expert_parallelism(
    gang: Any, degrees: dict[str, Any], sharded: bool
) -> None:
    (alone,) = gang.run(RANKS, "losses", 1, job=job(MOE), steps=3)
    made = job(MOE, use_distributed_optimizer=sharded, **degrees)
    for ours in gang.run(RANKS, "losses", 2, job=made, steps=3):
        assert close(ours, alone, 1e-6)


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recompute_changes_nothing(gang: Any, how: str, dropout: float) -> None:
    config = {**TINY, "attention_dropout": dropout}
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": dropout == 0.0}
    plain = gang.run(RANKS, "losses", 2, job=job(config, **parallel), steps=2)
    again = gang.run(RANKS, "losses", 2, job=job(config, {"recompute": how}, **parallel), steps=2)
    assert close(again[0], plain[0], 1e-6)


def test_bf16_stays_close_to_fp32(gang: Any) -> None:
    (exact,) = gang.run(RANKS, "losses", 1, job=job(), steps=4)
    for rank in gang.run(RANKS, "losses", 2, job=job(TINY, {"precision": "bf16"}), steps=4):
        assert rank != exact
        for (ours, norm), (theirs, their_norm) in zip(rank, exact, strict=True):
            assert abs(ours - theirs) < 7e-3
            assert math.isclose(norm, their_norm, rel_tol=3e-2)


def test_fp16_finds_its_loss_scale_by_skipping(gang: Any) -> None:
    train = {"precision": "fp16", "initial_loss_scale": 2.0**26, "max_skipped": 0}
    first, second = gang.run(RANKS, "fp16_scales", 2, job=job(TINY, train), steps=20)
    assert first == second
    skipped, reason, _ = first[0]
    assert skipped and "overflow" in reason
    assert not first[-1][0], "it never recovered"
    scales = [scale for _, _, scale in first]
    assert scales == sorted(scales, reverse=True) and scales[-1] < 2.0**26


@pytest.mark.parametrize(
    "parallel",
    [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {"context_parallel_size": 2}],
)
def test_evaluation_sees_the_updated_weights(gang: Any, parallel: dict[str, Any]) -> None:
    for evaluated, trained in gang.run(RANKS, "evaluate_after", 2, job=job(**parallel), steps=2):
        assert math.isclose(evaluated, trained, rel_tol=1e-6)


@pytest.mark.parametrize("parallel", [{}, {"pipeline_model_parallel_size": 2}])
def test_a_nan_is_skipped_for_good(gang: Any, parallel: dict[str, Any]) -> None:
    found = gang.run(RANKS, "poisoned", 2, job=job(TINY, {"nan_policy": "skip"}, **parallel), at=2, steps=5)
    for rank in found:
        assert rank["unchanged"]
        assert [result.skipped for result in rank["results"]] == [False, False, True, False, False]
        assert all(math.isfinite(result.loss) for result in rank["results"] if not result.skipped)
        assert "step 3" in rank["results"][2].reason
        assert str(rank["results"]) == str(found[0]["results"])


def test_a_nan_stops_the_run_and_names_the_batch(gang: Any) -> None:
    for rank in gang.run(RANKS, "poisoned", 2, job=job(), at=1, steps=3):
        assert "step 2 (samples 8-15" in rank["stopped"]


def test_one_process_builds_engine_after_engine(gang: Any) -> None:
    jobs = [job(), job(tensor_model_parallel_size=2), job(), job(pipeline_model_parallel_size=2)]
    for rank in gang.run(RANKS, "rebuild", 2, jobs=jobs):
        assert rank[0] == rank[2]
        assert all(close(numbers, rank[0], 1e-6) for numbers in rank)


@pytest.mark.parametrize(
    "parallel",
    [
        {},
        {"tensor_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    ],
)
def test_survivors_leave_and_join_again(gang: Any, parallel: dict[str, Any]) -> None:
    """Rank 3 of 4 is killed; the others close at once, and two of them go on as a gang of two."""
    smaller = {"ranks": 2, "job": job()}
    found = gang.run(RANKS, "lose_a_peer", 4, job=job(**parallel), smaller=smaller)
    assert found[3] is None and found[2] == {}
    expected = gang.run(RANKS, "losses", 2, job=job(), steps=2)
    for rank in found[:2]:
        assert rank["closed"] < 10 and rank["noticed"] < 20  # a loaded machine; a hang would be minutes
        assert rank["numbers"] == expected[0]
