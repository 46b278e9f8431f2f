"""Which environment variables a rank gets. One table; the first that sets a variable wins, top to bottom:

1. `cluster.env` of the job, except names that the gang itself must set (those are refused);
2. the driver's own environment, for the names in `PASSED`;
3. the rules below (threads, network interface), where neither of them said anything;
4. what the node's Ray was started with, except the names in `DROPPED`, which are taken away.

Nothing else in the package reads or writes environment variables for ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from swift_dist.config.job import ClusterSection
from swift_dist.errors import JobError

PASSED = (
    "NCCL_*", "GLOO_*", "UCX_*", "FI_*", "IB_*", "NVSHMEM_*", "RCCL_*",
    "CUDA_*", "CUDNN_*", "CUBLAS_*", "NVIDIA_*", "NVTE_*", "TORCH_*", "TORCHINDUCTOR_*", "PYTORCH_*", "TRITON_*",
    "OMP_*", "MKL_*", "KMP_*", "OPENBLAS_*", "MALLOC_*", "TOKENIZERS_PARALLELISM",
    "HF_*", "HUGGINGFACE_*", "HUGGING_FACE_*", "TRANSFORMERS_*", "DATASETS_*", "MODELSCOPE_*",
    "WANDB_*", "SWANLAB_*", "MLFLOW_*", "TENSORBOARD_*",
    "AWS_*", "S3_*", "GOOGLE_*", "AZURE_*", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy",
    "no_proxy", "SSL_CERT_*", "REQUESTS_CA_BUNDLE", "PYTHONPATH", "PYTHONHASHSEED", "PYTHONWARNINGS",
    "LANG", "LC_*", "TZ", "XDG_CACHE_HOME", "SWIFT_DIST_*",
)  # fmt: skip
"""Copied from the driver. Not PATH, HOME, LD_LIBRARY_PATH: those belong to the node."""

DROPPED = (
    "SLURM_*", "SLURMD_*", "SRUN_*", "SBATCH_*", "PMI_*", "PMI2_*", "PMIX_*", "OMPI_*", "PRTE_*", "HYDRA_*", "MPI_*",
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_*", "NODE_RANK", "NPROC_PER_NODE",
)  # fmt: skip
"""Never reach a rank: a library that finds them believes it was started by another launcher."""

RESERVED = ("CUDA_VISIBLE_DEVICES", "RAY_*", *DROPPED)
"""The gang's own business; `cluster.env` may not set them."""


@dataclass(frozen=True)
class NodeFacts:
    """What the rules need to know about a rank's node.

    Attributes:
        num_ranks: ranks on it.
        num_cpus: CPU cores that its processes may use.
        interface: the network interface that carries the node's address, or None if unknown.
        has_gpu: whether the ranks compute on GPUs.
    """

    num_ranks: int
    num_cpus: int
    interface: str | None
    has_gpu: bool


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_environment(settings: ClusterSection) -> None:
    """Refuse variables in `cluster.env` that the gang sets itself.

    Raises:
        JobError: naming the first such variable.
    """
    for name in settings.env:
        if matches(name, RESERVED):
            raise JobError("cluster.env", f"{name} is set by the gang itself", "leave it out")


def environment(parent: Mapping[str, str], settings: ClusterSection, node: NodeFacts) -> dict[str, str]:
    """The variables to set in a rank's process before it imports anything heavy.

    Args:
        parent: the driver's environment.
        settings: the job's cluster section.
        node: the rank's node.
    """
    passed = {name: value for name, value in parent.items() if matches(name, PASSED) and not matches(name, RESERVED)}
    return {**_rules(settings, node), **passed, **_asked_threads(settings), **settings.env}


def without_dropped(variables: Mapping[str, str]) -> dict[str, str]:
    """`variables` less those that must never reach a rank."""
    return {name: value for name, value in variables.items() if not matches(name, DROPPED)}


def num_threads(variables: Mapping[str, str]) -> int:
    """With which a rank computes: OMP_NUM_THREADS, of which `4,2` is four, each with two for what it calls in turn.

    0 where it is no number, which OpenMP ignores.
    """
    first = variables["OMP_NUM_THREADS"].partition(",")[0].strip()
    return int(first) if first.isdigit() else 0


def _asked_threads(settings: ClusterSection) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(settings.threads_per_rank)} if settings.threads_per_rank else {}


def _rules(settings: ClusterSection, node: NodeFacts) -> dict[str, str]:
    """Defaults. Threads: the node's cores shared out among its ranks on CPU; few on a GPU, whose rank mostly waits."""
    share = max(1, node.num_cpus // node.num_ranks)
    rules = {"OMP_NUM_THREADS": str(min(share, 8) if node.has_gpu else share)}
    if node.interface:
        rules["GLOO_SOCKET_IFNAME"] = node.interface
        if node.has_gpu:
            rules["NCCL_SOCKET_IFNAME"] = node.interface
    if node.has_gpu:
        # A failed collective ends the rank's process, which is then replaced: it must neither hang nor go on with
        # whatever the broken collective left in its buffers.
        rules["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "1"
        rules["NCCL_DEBUG"] = "WARN"
        # megatron-core relies on it to start a layer's communication before the computation that hides it.
        rules["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    else:
        rules["CUDA_VISIBLE_DEVICES"] = ""  # on a machine with GPUs, ranks on the CPU must not find them
    return rules
