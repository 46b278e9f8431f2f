"""What a rank does in the golden tests (run by `gang.Gang`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import golden_cases as cases

from swift_dist.config import JobConfig
from swift_dist.engines import build_engine


def train(worker: Any, job: dict[str, Any], weights: str, steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, starting from the Hugging Face folder `weights`."""
    config = JobConfig.model_validate(job)
    engine = build_engine(config, job["model"]["config"], worker)
    try:
        engine.load_pretrained(Path(weights))
        numbers = []
        for step in range(steps):
            whole = cases.batch(step, job["model"]["config"]["vocab_size"])
            mine = cases.share(whole, engine.data.dp_rank, engine.data.dp_size, config.train.micro_batch_size)
            result = engine.train_step(mine if engine.data.needs_data else [], step)
            assert not result.skipped
            numbers.append((result.loss, result.grad_norm))
        return numbers
    finally:
        engine.close()
