"""Runs of the training page on forked ranks, and the loop of one process that they are compared with."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch


def train(worker: Any, payload: dict[str, Any], run_dir: str, stop_after: int | None = None) -> dict[str, Any]:
    """`swift_dist.train.main`; returns its result and the bytes that this rank held."""
    from swift_dist import train as page
    from swift_dist.engines.hf.engine import HFEngine

    logging.disable(logging.INFO)
    worker = _Again(worker, Path(run_dir))
    held: dict[str, int] = {}
    close, step = HFEngine.close, HFEngine.train_step

    def closing(engine: HFEngine) -> None:
        if "strategy" in engine.__dict__:
            held.update(engine.strategy.held_bytes())
        close(engine)

    def stepping(engine: HFEngine, micro_batches: Any, number: int, *, stop: bool = False) -> Any:
        return step(engine, micro_batches, number, stop=stop or number + 1 == stop_after)

    HFEngine.close, HFEngine.train_step = closing, stepping  # type: ignore[method-assign]
    return {**page.main(payload, worker), "held": held}


class _Again:
    """A worker that hands out one store, and runs in a folder of the test's."""

    def __init__(self, worker: Any, run_dir: Path) -> None:
        self._worker, self._store, self.run_dir = worker, None, run_dir

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)

    def store(self) -> Any:
        self._store = self._store or self._worker.store()
        return self._store


def learner_of(model: str, adapter: dict[str, Any] | None, seed: int) -> Any:
    """What a plain loop trains: transformers' own attention, in fp32, with the tuner's adapter where there is one."""
    from transformers import AutoModelForCausalLM

    learner = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    if adapter is not None:
        from swift_dist.config import TunerSection
        from swift_dist.tuners import find_tuners

        learner = find_tuners(TunerSection(**adapter)).apply(learner, seed=seed)
    return learner.train()


class AdamW:
    """torch's, with the job's defaults: decay of matrices alone, clipping to 1."""

    def __init__(self, learner: Any, lr: float) -> None:
        self.parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in self.parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95), eps=1e-8)

    def step(self, loss: torch.Tensor) -> list[float]:
        """[loss, gradient norm before clipping]."""
        self._adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._adamw.step()
        return [float(loss.detach()), float(norm)]


def reference(
    worker: Any, model: str, batches: list[list[dict[str, list]]], lr: float, adapter: dict[str, Any] | None, seed: int
) -> list[list[float]]:
    """(loss, gradient norm) of each step by a plain loop: whole samples one by one, transformers' own attention,
    `log_softmax` over all of the vocabulary, AdamW of torch. Each batch is a list of {ids, weights}."""
    learner = learner_of(model, adapter, seed)
    optimizer = AdamW(learner, lr)
    rows = []
    for batch in batches:
        total = sum(sum(sample["weights"]) for sample in batch)
        loss = torch.zeros(())
        for sample in batch:
            ids, weights = torch.tensor([sample["ids"]]), torch.tensor(sample["weights"])
            logps = learner(input_ids=ids).logits[0, :-1].log_softmax(-1)
            loss = loss - (logps.gather(1, ids[0, 1:, None])[:, 0] * weights[1:]).sum() / total
        rows.append(optimizer.step(loss))
    return rows


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
