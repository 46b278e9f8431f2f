"""A model, rows and commands that fine-tune in seconds; how ends of such runs are compared."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chat_model
from dist_tensors import dist_tensors
from same_end import metrics, same

from swift_dist.checkpoint import open_checkpoint

STEPS, INTERVAL, BATCH = 24, 4, 8
"""Of an undisturbed run; its one epoch ends with a batch that is not full."""
ROWS = STEPS * BATCH - 3


@dataclass(frozen=True)
class Files:
    """A model folder with its tokenizer, and rows that each have samples of their own."""

    model: str
    rows: str

    def words(self, *more: str, ranks: int = 2) -> list[str]:
        """`swift-dist sft` of one epoch, without --output."""
        return [
            *("sft", "--model", self.model, "--dataset", self.rows, "--max_length", "256", "--data.workers", "1"),
            *("--train.precision", "fp32", "--train.micro_batch_size", "2", "--train.global_batch_size", str(BATCH)),
            *("--optimizer.lr", "0.005", "--checkpoint.interval", str(INTERVAL), "--report.tensorboard", "false"),
            *("--nproc_per_node", str(ranks), "--cluster.accelerator", "cpu", "--cluster.threads_per_rank", "1"),
            *("--cluster.max_failures", "10", "--json", *more),
        ]


def write_files(folder: Path) -> Files:
    model = chat_model.save_chat_model(folder / "model")
    rows = [{"messages": row["messages"][:2]} for row in chat_model.conversations(ROWS)]
    return Files(str(model), str(chat_model.save_rows(folder / "rows.jsonl", rows)))


def exported(output: Path) -> dict[str, Any]:
    """The tensors of a run's final weights by name."""
    from safetensors.torch import load_file

    (file,) = [*output.glob("model/*.safetensors"), *output.glob("adapter/*.safetensors")]
    return load_file(file)


def assert_same_weights(output: Path, quiet: Path) -> None:
    """Every bit of the final weights; some of them learnt (an adapter's B begins with zeros)."""
    mine, theirs = exported(output), exported(quiet)
    assert mine.keys() == theirs.keys() and any("lora_B" in name or "embed" in name for name in mine)
    assert all(float(tensor.abs().max()) > 0 for tensor in mine.values())
    assert [name for name, tensor in mine.items() if not same(tensor, theirs[name])] == []


def assert_same_end(output: Path, quiet: Path, steps: int = STEPS) -> None:
    """Final weights, checkpoint with optimizer, and each step's row: once, and the same in every bit."""
    assert_same_weights(output, quiet)
    mine, theirs = open_checkpoint(output), open_checkpoint(quiet)
    assert mine.step == theirs.step == steps
    left, right = dist_tensors(mine.path), dist_tensors(theirs.path)
    assert left.keys() == right.keys() and any("exp_avg" in key for key in left)
    assert [key for key, tensor in left.items() if not same(tensor, right[key])] == []
    rows = metrics(output)
    assert rows == metrics(quiet) and [row[0] for row in rows] == list(range(1, steps + 1))
    assert not list((output / "checkpoints").glob("*tmp*")) and not list(output.glob(".*.partial"))


def samples_seen(output: Path, ranks: list[int], steps: list[range]) -> Counter[bytes]:
    """How often each sample (its tokens) was dealt out, by a run whose attempts had these numbers of ranks.

    Args:
        ranks: of each attempt; steps: which steps of it count.
    """
    from swift_dist.config import JobConfig
    from swift_dist.data.samples.opening import open_samples
    from swift_dist.resolve import resolve
    from swift_dist.runs.folder import RunFolder

    job = JobConfig.model_validate({**RunFolder(output).job(), "task": "sft"})
    seen: Counter[bytes] = Counter()
    for number, those in zip(ranks, steps, strict=True):
        payload = resolve(job, nproc_per_node=number, on_cuda=False, output=str(output)).payload()
        for rank in range(number):
            data = open_samples(payload["samples"], job, dp_rank=rank, dp_size=number, layout="padded", pad_id=1)
            for step in those:
                for batch in data.micro_batches(step):
                    used = zip(batch["tokens"], batch["lengths"], batch["sample_weights"], strict=True)
                    seen.update(row[: int(length)].numpy().tobytes() for row, length, weight in used if weight)
            data.close()
    return seen


def newest_row(output: Path) -> int:
    """The newest step in metrics.jsonl; 0 without one."""
    file = output / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0
