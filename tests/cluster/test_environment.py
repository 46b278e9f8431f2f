"""What a rank sees of the driver's environment: one table, pure."""

from __future__ import annotations

import pytest

from swift_dist.cluster.environment import NodeFacts, check_environment, environment, without_dropped
from swift_dist.config.job import ClusterSection
from swift_dist.errors import JobError

CPU_NODE = NodeFacts(num_ranks=2, num_cpus=8, interface="eth0", has_gpu=False)
GPU_NODE = NodeFacts(num_ranks=8, num_cpus=128, interface="eth0", has_gpu=True)


@pytest.mark.parametrize(
    "name",
    ["NCCL_ALGO", "GLOO_SOCKET_IFNAME", "HF_TOKEN", "HF_HOME", "WANDB_API_KEY", "CUDA_LAUNCH_BLOCKING", "TORCH_LOGS",
     "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS", "PYTHONPATH", "NVTE_FRAMEWORK", "MLFLOW_TRACKING_URI"],
)  # fmt: skip
def test_passed(name: str) -> None:
    assert environment({name: "value"}, ClusterSection(), CPU_NODE)[name] == "value"


@pytest.mark.parametrize(
    "name",
    ["SLURM_JOB_ID", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR",
     "MASTER_PORT", "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES", "RAY_ADDRESS", "RAY_AUTH_TOKEN", "PATH", "HOME",
     "LD_LIBRARY_PATH", "SOME_SECRET"],
)  # fmt: skip
def test_not_passed(name: str) -> None:
    assert environment({name: "value"}, ClusterSection(), CPU_NODE).get(name) != "value"


def test_what_another_launcher_left_is_taken_away() -> None:
    left = without_dropped({"SLURM_PROCID": "3", "RANK": "1", "PMIX_NAMESPACE": "x", "PATH": "/bin", "HOME": "/"})
    assert left == {"PATH": "/bin", "HOME": "/"}


def test_threads() -> None:
    def threads(parent: dict[str, str], node: NodeFacts, **settings: object) -> str:
        return environment(parent, ClusterSection(**settings), node)["OMP_NUM_THREADS"]

    assert threads({}, CPU_NODE) == "4"
    assert threads({}, NodeFacts(16, 8, None, False)) == "1"
    assert threads({}, GPU_NODE) == "8"
    assert threads({"OMP_NUM_THREADS": "1"}, CPU_NODE) == "1"
    assert threads({"OMP_NUM_THREADS": "1"}, CPU_NODE, threads_per_rank=3) == "3"
    assert threads({}, CPU_NODE, threads_per_rank=3, env={"OMP_NUM_THREADS": "2"}) == "2"


def test_the_user_wins_over_the_rules_and_the_job_over_the_shell() -> None:
    rules = environment({}, ClusterSection(), GPU_NODE)
    assert rules["NCCL_SOCKET_IFNAME"] == rules["GLOO_SOCKET_IFNAME"] == "eth0"
    shell = environment({"NCCL_SOCKET_IFNAME": "ib0"}, ClusterSection(), GPU_NODE)
    assert (shell["NCCL_SOCKET_IFNAME"], shell["GLOO_SOCKET_IFNAME"]) == ("ib0", "eth0")
    job = environment({"NCCL_SOCKET_IFNAME": "ib0"}, ClusterSection(env={"NCCL_SOCKET_IFNAME": "ib1"}), GPU_NODE)
    assert job["NCCL_SOCKET_IFNAME"] == "ib1"
    assert "NCCL_SOCKET_IFNAME" not in environment({}, ClusterSection(), CPU_NODE)


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "RAY_ADDRESS", "RANK", "MASTER_PORT", "SLURM_NTASKS"])
def test_a_job_may_not_set_what_the_gang_sets(name: str) -> None:
    with pytest.raises(JobError, match=name) as caught:
        check_environment(ClusterSection(env={name: "1"}))
    assert caught.value.key == "cluster.env"


def test_ranks_on_the_cpu_see_no_gpu() -> None:
    shell = {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert environment(shell, ClusterSection(), CPU_NODE)["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in environment(shell, ClusterSection(), GPU_NODE)  # set with the rank's place


def test_gpu_ranks_overlap_communication_unless_told_otherwise() -> None:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    assert environment({}, ClusterSection(), GPU_NODE)[name] == "1"
    assert environment({name: "8"}, ClusterSection(), GPU_NODE)[name] == "8"
    assert name not in environment({}, ClusterSection(), CPU_NODE)
