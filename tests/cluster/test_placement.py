"""What a job needs against what a cluster has, and where the ranks go: pure."""

from __future__ import annotations

import pytest

from swift_dist.cluster.devices import Devices, choose_devices, gpus_per_node
from swift_dist.cluster.placement import Demand, crossing_warning, rank_places, require_placeable, what_is_missing
from swift_dist.config.job import ClusterSection
from swift_dist.errors import JobError
from swift_dist.parallel import ParallelLayout

BIG = {"CPU": 64.0, "GPU": 8.0}
SMALL = {"CPU": 64.0, "GPU": 4.0}


def test_a_cluster_that_has_it_misses_nothing() -> None:
    assert what_is_missing(Demand(2, 8, 8, 8), [BIG, BIG, SMALL]) is None
    assert what_is_missing(Demand(1, 2, 2, 0), [{"CPU": 2.0}]) is None


@pytest.mark.parametrize(
    ("demand", "nodes", "key", "words"),
    [
        (Demand(2, 8, 8, 8), [BIG, SMALL], "cluster.nproc_per_node", "has 1 such node (of 2: 1 x 8 GPUs, 64 CPUs; 1 x"),
        (Demand(3, 8, 8, 8), [BIG, BIG], "cluster.nnodes", "needs 3 nodes with 8 GPUs and 8 CPUs each"),
        (Demand(1, 4, 4, 0), [{"CPU": 2.0}], "cluster.cpus_per_rank", "needs 1 node with 4 CPUs each"),
        (Demand(1, 1, 1, 1), [], "cluster.nnodes", "(of 0: none)"),
    ],
)
def test_an_unplaceable_job_names_key_and_numbers(demand: Demand, nodes: list, key: str, words: str) -> None:
    with pytest.raises(JobError) as caught:
        require_placeable(demand, nodes)
    assert caught.value.key == key and words in caught.value.message


def test_tensor_parallel_groups_stay_inside_a_node() -> None:
    layout = ParallelLayout(world_size=16, tp=4)
    places = rank_places(layout, Demand(2, 8, 8, 8))
    assert [p.node for p in places] == [0] * 8 + [1] * 8
    assert [p.local_rank for p in places] == [*range(8), *range(8)]
    assert crossing_warning(layout, places) is None


def test_a_group_that_spans_nodes_is_warned_of() -> None:
    layout = ParallelLayout(world_size=4, tp=4)
    warning = crossing_warning(layout, rank_places(layout, Demand(2, 2, 2, 0)))
    assert warning and "TP groups of 4 ranks span nodes" in warning and "[0, 1, 2, 3]" in warning


def test_devices() -> None:
    assert choose_devices(ClusterSection(), 8, "it") == Devices(True, 8)
    assert choose_devices(ClusterSection(), 0, "it") == Devices(False, 1)
    assert choose_devices(ClusterSection(nproc_per_node=2), 8, "it") == Devices(True, 2)
    assert choose_devices(ClusterSection(accelerator="cpu", nproc_per_node=4), 1, "it") == Devices(False, 4)
    with pytest.raises(JobError, match="it has no GPU"):
        choose_devices(ClusterSection(accelerator="gpu"), 0, "it")
    with pytest.raises(JobError, match="4 ranks need a GPU each; it has 1"):
        choose_devices(ClusterSection(nproc_per_node=4), 1, "it")


def test_a_machine_without_gpus_may_plan_for_some() -> None:
    settings = ClusterSection(nproc_per_node=8, accelerator="gpu")
    assert choose_devices(settings, 0, "here", planning=True) == Devices(True, 8)
    with pytest.raises(JobError, match="here has no GPU"):
        choose_devices(settings, 0, "here")


def test_the_variable_nproc_per_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC_PER_NODE", "4")
    assert choose_devices(ClusterSection(), 8, "it").nproc_per_node == 4
    assert choose_devices(ClusterSection(nproc_per_node=2), 8, "it").nproc_per_node == 2
    monkeypatch.setenv("NPROC_PER_NODE", "many")
    with pytest.raises(JobError, match="NPROC_PER_NODE"):
        choose_devices(ClusterSection(), 8, "it")


def test_gpus_per_node_is_what_the_nodes_in_question_all_have() -> None:
    assert gpus_per_node([BIG, SMALL, {"CPU": 4.0}], 1) == 8
    assert gpus_per_node([BIG, SMALL, {"CPU": 4.0}], 2) == 4
    assert gpus_per_node([BIG, SMALL, {"CPU": 4.0}], 3) == 0
    assert gpus_per_node([], 1) == 0
