"""Runs of whole fine-tuning jobs on a gang's ranks, each in a folder of its own, and the curves that they leave."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import chat_model
import sft_ranks

from swift_dist.config import JobConfig
from swift_dist.config.load import build
from swift_dist.resolve import resolve

RANKS = Path(__file__).with_name("sft_ranks.py")
LORA = {"name": ["lora"], "lora": {"rank": 4, "alpha": 8}}


class Runs:
    """Runs in folders of their own."""

    def __init__(self, gang: Any, folder: Path) -> None:
        self.gang, self.folder, self._numbers = gang, folder, itertools.count()
        self.model = str(chat_model.save_chat_model(folder / "model"))
        self.dataset = str(chat_model.save_rows(folder / "rows.jsonl", chat_model.conversations(40)))
        self.pairs = str(chat_model.save_rows(folder / "pairs.jsonl", chat_model.preferences(24)))

    def job(self, task: str = "sft", **changes: Any) -> JobConfig:
        base = {
            "task": task,
            "model": {"path": self.model},
            "data": {"train": [self.pairs if task == "rlhf" else self.dataset], "sequence_length": 128, "workers": 1},
            "train": {"steps": 5, "micro_batch_size": 2, "global_batch_size": 8, "precision": "fp32", "seed": 3},
            "optimizer": {"lr": 5e-3},
            "schedule": {"name": "constant"},
            "report": {"tensorboard": False},
        }
        return build(JobConfig, [base, *([changes] if changes else [])])

    def resolved(self, job: JobConfig, world: int, folder: Path) -> dict[str, Any]:
        return resolve(job, nproc_per_node=world, on_cuda=False, output=str(folder)).payload()

    def sequences(self, job: JobConfig) -> list[list[dict[str, list]]]:
        """The sequences of each of five steps, one by one, {ids, weights}, as the data room orders them."""
        from swift_dist.data.samples.opening import open_samples

        payload = self.resolved(job, 1, self.folder / "none")
        data = open_samples(payload["samples"], job, dp_rank=0, dp_size=1, layout="padded", pad_id=1)
        steps = []
        for step in range(5):
            found = []
            for batch in data.micro_batches(step):
                for row, length in enumerate(batch["lengths"].tolist()):
                    weights = batch["weights"][row, :length].tolist()
                    found.append({"ids": batch["tokens"][row, :length].tolist(), "weights": [0.0, *weights[:-1]]})
            steps.append(found)
        data.close()
        return steps

    def new_folder(self) -> Path:
        folder = self.folder / f"run-{next(self._numbers)}"
        folder.mkdir()
        return folder

    def run(self, job: JobConfig, world: int, folder: Path | None = None, **arguments: Any) -> tuple[Path, list[Any]]:
        if folder is None:
            folder = self.new_folder()
        payload = self.resolved(job, world, folder)
        return folder, self.gang.run(RANKS, "train", world, payload=payload, run_dir=str(folder), **arguments)


def curve(folder: Path) -> list[list[float]]:
    return [[row["loss"], row["grad_norm"]] for row in sft_ranks.rows(folder) if "loss" in row]
