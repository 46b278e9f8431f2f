"""The hf engine's state as megatron-core's distributed checkpoint wants it, and back; and its final weights."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_dist.data.templates.exported import exported_tokenizer
from swift_dist.engines.hf.tokenizer import tokenizer_of
from swift_dist.runs.guard import GuardHistory

if TYPE_CHECKING:
    import torch

    from swift_dist.config import JobConfig
    from swift_dist.engines.hf.engine import HFEngine

log = logging.getLogger(__name__)


def collect(engine: HFEngine, is_loading: bool) -> dict[str, Any]:
    """See `HFEngine.sharded_state_dict`.

    What is the same on every rank is saved once: the tuners' own state too.
    """
    return {
        **engine.strategy.sharded_state(is_loading),
        "engine": {
            "steps": engine.steps,
            "updates": engine.updates,
            "guard": engine.history.to_dict(),
            "tuners": engine.tuners.state(engine.model),
        },
    }


def restore(engine: HFEngine, loaded: dict[str, Any]) -> None:
    """See `HFEngine.load_state_dict`."""
    engine.strategy.load_sharded_state(loaded)
    numbers = loaded["engine"]
    engine.updates, engine.steps = numbers["updates"], numbers["steps"]
    engine.history = GuardHistory.from_dict(numbers["guard"])
    engine.tuners.load_state(engine.model, numbers["tuners"])


def export(engine: HFEngine, run_dir: Path) -> Path | None:
    """See `HFEngine.export`: ``model/`` for whole weights, ``adapter/`` for those beside a base.

    Rank 0 gathers one tensor at a time. The tokenizer and its chat template go with the weights. A folder that is there
    already (the run went on) is replaced when the new one is whole.
    """
    whole = engine.strategy.whole_weights(engine.tuners.exported(engine.model))
    rounded = rounded_for_export(engine.job, engine.model)
    weights = {name: rounded(name, tensor) for name, tensor in whole}
    if engine.worker.rank != 0:
        return None
    folder = run_dir / engine.tuners.saves
    partial = run_dir / f".{folder.name}.partial"
    for left_over in run_dir.glob(f".*{folder.name}.partial*"):  # of an export that was killed, and its own parts
        shutil.rmtree(left_over, ignore_errors=True)
    if engine.job.model.problem_type:
        config: Any = engine.model.config
        config.problem_type = engine.job.model.problem_type  # what turns scores into answers
    engine.tuners.export(engine.model, weights, partial)
    tokenizer = tokenizer_of(engine.job)
    if tokenizer is not None:
        exported_tokenizer(tokenizer, engine.job.template).save_pretrained(partial)
    previous = run_dir / f".{folder.name}.previous"
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    partial.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)
    log.info("wrote %s", folder)
    return folder


def rounded_for_export(job: JobConfig, model: Any) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """What gives a weight the dtype of `checkpoint.export_dtype`, but for what its architecture keeps in fp32 whatever
    the rest is in."""
    from swift_dist.engines.hf.model import DTYPES

    dtype = job.checkpoint.export_dtype
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == "fp16":
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())

    def rounded(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if dtype is None or not tensor.is_floating_point():
            return tensor
        in_fp32 = any(f".{part}." in f".{name}." for part in kept)
        return tensor if in_fp32 else tensor.to(DTYPES[dtype])

    return rounded
