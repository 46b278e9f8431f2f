"""What ranks do in the tests of reference models: plain loops of one process, and looks into an engine."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import Any

import sft_ranks
import torch


def dpo(
    worker: Any,
    model: str,
    reference: str,
    steps: list[list[dict[str, list]]],
    lr: float,
    adapter: dict[str, Any] | None,
    seed: int,
    beta: float,
) -> list[list[float]]:
    """(loss, gradient norm) of each step by a plain loop: answers one by one, transformers' own attention, two models,
    AdamW of torch. Each step is a list of answers {ids, weights}: chosen, rejected, chosen, ..."""
    from transformers import AutoModelForCausalLM

    learner = sft_ranks.learner_of(model, adapter, seed)
    fixed = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32, attn_implementation="eager").eval()
    optimizer = sft_ranks.AdamW(learner, lr)
    rows = []
    for answers in steps:
        loss = torch.zeros(())
        for chosen, rejected in zip(answers[0::2], answers[1::2], strict=True):
            with torch.no_grad():
                before = _log_probability(fixed, chosen) - _log_probability(fixed, rejected)
            margin = _log_probability(learner, chosen) - _log_probability(learner, rejected) - before
            loss = loss + (1 + (-beta * margin).exp()).log() / (len(answers) / 2)
        rows.append(optimizer.step(loss))
    return rows


def _log_probability(model: Any, sample: dict[str, list]) -> torch.Tensor:
    ids, weights = torch.tensor([sample["ids"]]), torch.tensor(sample["weights"])
    logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return (logps.gather(1, ids[0, 1:, None])[:, 0] * weights[1:]).sum()


def beside_a_learner(worker: Any, payload: dict[str, Any], run_dir: str, reference: str) -> dict[str, float]:
    """After two steps, with the learner in training mode: how far the reference's log-probabilities are from those of
    a plain model without dropout (`off`), how much the learner's differ from them (`learnt`), and between two forward
    passes of the learner (`dropout`)."""
    from transformers import AutoModelForCausalLM

    from swift_dist.config import JobConfig
    from swift_dist.data import open_data
    from swift_dist.engines.hf.engine import HFEngine

    job = JobConfig.model_validate(payload["job"])
    engine = HFEngine(job, payload["hf_config"], worker)
    try:
        data = open_data(job, engine, payload)
        for step in range(2):
            engine.train_step(data.micro_batches(step), step)
        micro = data.micro_batches(2)
        data.close()
        engine.strategy.module.train()
        item = engine.prepared(micro)[0][0]
        found = engine.reference.logps(item)
        assert engine.strategy.module.training
        with torch.no_grad():
            one, two = (engine.forward(engine.strategy.module, item).logps for _ in range(2))
        plain = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            logits = plain(**{k: v for k, v in item.arguments.items() if k != "use_cache"}).logits
        logps = logits[:, item.columns][item.chosen].log_softmax(-1).gather(1, item.labels[:, None])[:, 0]
        return {
            "off": float((found - logps).abs().max()),
            "learnt": float((one - found).abs().max()),
            "dropout": float((one - two).abs().max()),
        }
    finally:
        engine.close()


def watched(
    worker: Any, payload: dict[str, Any], run_dir: str, kill_at: int | None = None, stop_at: int | None = None
) -> dict[str, Any]:
    """A run of the training page; beside its result the micro-batches that the reference computed, and the bytes of all
    tensors that this rank holds in its last step.

    Args:
        kill_at: before which of those micro-batches this process is killed; stop_at: a stop is asked for.
    """
    from swift_dist.engines.hf import precomputed
    from swift_dist.engines.hf.engine import HFEngine
    from swift_dist.engines.hf.reference import Reference
    from swift_dist.runs import recorder

    precomputed._ROUNDS, recorder._SECONDS_BETWEEN_SHARES = 1, 0.0
    passes, held = [0], [0]
    logps, forward = Reference.logps, HFEngine._forward

    def counted(reference: Any, item: Any) -> torch.Tensor:
        if passes[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        passes[0] += 1
        return logps(reference, item)

    def weighed(engine: Any, item: Any, batch: Any) -> Any:
        if engine.steps == engine.job.train.steps - 1 and not held[0]:
            held[0] = _bytes_held()
        return forward(engine, item, batch)

    Reference.logps, HFEngine._forward = counted, weighed  # type: ignore[method-assign]
    worker.stop_requested = lambda: stop_at is not None and passes[0] >= stop_at
    result = sft_ranks.train(worker, payload, run_dir)
    return {**result, "passes": passes[0], "bytes": held[0]}


def _bytes_held() -> int:
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor) and type(found).__name__ != "FakeTensor":
            inner = found.to_local() if hasattr(found, "to_local") else found
            storage = inner.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def numbers(folder: Path) -> dict[str, bytes]:
    """The precomputed log-probabilities of a run folder, by file."""
    return {path.name: path.read_bytes() for path in sorted((folder / "reference").iterdir())}
