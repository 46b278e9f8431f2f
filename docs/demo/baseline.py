"""Compares a run's validation loss with a unigram model's on the very same tokens.

The unigram model knows only how often each token occurs in the training data: p(t) = (n_t + 1) / (N + V). Its loss is
what a model reaches that has learnt nothing about context.

    python docs/demo/baseline.py .demo/run
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from swift_dist.config.load import load_job
from swift_dist.data.loader import TrainingData
from swift_dist.data.store import TokenStore
from swift_dist.runs.metrics import read_metrics


def unigram_loss(folder: Path) -> float:
    """Mean of -ln p over the tokens that the run's evaluations predict, in nats."""
    job = load_job(folder / "job.yaml")
    assert job.model.config is not None
    counts = np.ones(job.model.config["vocab_size"])
    for entry in job.data.train:
        with TokenStore(entry.path) as store:
            counts += np.bincount(store.read(0, int(store.lengths().sum())), minlength=len(counts))
    log_p = np.log(counts / counts.sum())
    data = TrainingData(
        job.data,
        seed=job.train.seed,
        global_batch_size=job.train.global_batch_size,
        micro_batch_size=job.train.micro_batch_size,
        dp_rank=0,
        dp_size=1,
    )
    batches = [batch for step in data.validation_batches(job.train.eval_steps) for batch in step]
    data.close()
    labels = np.concatenate([np.asarray(batch["labels"]).ravel() for batch in batches])
    counted = np.concatenate([np.asarray(batch["loss_mask"]).ravel() for batch in batches]) > 0
    return float(-log_p[labels[counted]].mean())


def main() -> int:
    folder = Path(sys.argv[1])
    rows = read_metrics(folder / "metrics.jsonl")
    model = [row["eval_loss"] for row in rows if "eval_loss" in row][-1]
    unigram = unigram_loss(folder)
    print(f"validation loss  {model:.3f} nats a token (perplexity {np.exp(model):.0f})")
    print(f"unigram baseline {unigram:.3f} nats a token (perplexity {np.exp(unigram):.0f}), on the same tokens")
    return 0 if model < unigram else 1


if __name__ == "__main__":
    sys.exit(main())
