"""Whose kernels compute a model's norms, rotary embeddings and gated MLPs: transformers' own code, Liger's, or ours."""

from __future__ import annotations

import importlib.util
import logging
from collections import Counter
from typing import Any, Literal

import torch

from swift_dist.config import JobConfig
from swift_dist.errors import JobError
from swift_dist.kernels import slots
from swift_dist.kernels._triton import HAVE_TRITON

log = logging.getLogger(__name__)


def choose(job: JobConfig, device: torch.device) -> Literal["liger", "ours", "none"]:
    """What is asked for (`resolve` refuses both at once), else Liger's on CUDA where they are installed.

    Raises:
        JobError: what is asked for cannot be used.
    """
    on_cuda, has_liger = device.type == "cuda", importlib.util.find_spec("liger_kernel") is not None
    if job.model.liger and not (on_cuda and has_liger):
        raise JobError("model.liger", "needs an NVIDIA GPU and the package liger-kernel", "leave it out")
    if job.model.kernels and on_cuda and not HAVE_TRITON:
        raise JobError("model.kernels", "needs the package triton on a GPU", "pip install triton, or leave it out")
    if job.model.kernels:
        return "ours"
    wants_liger = on_cuda and has_liger if job.model.liger is None else job.model.liger
    return "liger" if wants_liger else "none"


def use(model: torch.nn.Module, job: JobConfig, device: torch.device) -> None:
    """Put them in their places, before anything else replaces parts of the model. (The loss is not among them:
    objectives take log-probabilities.)

    Args:
        model: as transformers makes it; its weights may be on any device.
        job: the job.
        device: where it is going to compute.

    Raises:
        JobError: what is asked for cannot be used.
    """
    chosen = choose(job, device)
    if chosen == "liger":
        liger: Any = importlib.import_module("liger_kernel.transformers")
        liger._apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    elif chosen == "ours":
        filled = slots.install(model)
        if not filled:
            raise JobError(
                "model.kernels", f"{type(model).__name__} has no part that one of them computes", "leave it out"
            )
        counts = Counter(place.kernel for place in filled)
        log.info("kernels: %s", ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
