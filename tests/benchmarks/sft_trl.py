"""A rank of TRL's SFTTrainer, for `bench_sft.py`: torchrun ... sft_trl.py CASE.json.

The case holds the samples in the order in which ranks take them, so that a step sees what swift-dist's step sees:
accelerate deals whole micro-batches out to the ranks in turn.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any


def main(path: str) -> None:
    warnings.simplefilter("ignore")
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    case: dict[str, Any] = json.loads(Path(path).read_text())
    config = SFTConfig(
        output_dir=case["output"],
        use_cpu=True,
        ddp_backend="gloo",
        bf16=False,
        gradient_checkpointing=False,  # TRL's default is True, which would cost it a second forward pass
        ddp_find_unused_parameters=False,  # the default without checkpointing walks the graph at every step
        max_length=None,  # the samples are short enough
        padding_free=case["padding_free"],
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        model_init_kwargs={"dtype": "float32"},
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **case["arguments"],
    )

    class Clock(TrainerCallback):
        """When steps end, and the loss of each."""

        def __init__(self) -> None:
            self.ends: list[float] = []
            self.losses: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kw: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(logs["loss"])

    clock = Clock()
    trainer = SFTTrainer(
        model=case["model"],
        args=config,
        train_dataset=Dataset.from_list(case["samples"]),
        processing_class=AutoTokenizer.from_pretrained(case["model"]),
        callbacks=[clock],
    )
    trainer.train()
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel), type(trainer.model_wrapped)
    if trainer.args.process_index == 0:
        from swift_dist.runs.throughput import memory_gib  # as ours is measured; imported when the peak has passed

        found = {
            "ends": clock.ends,
            "losses": clock.losses,
            "memory_gib": memory_gib("cpu"),
        }
        Path(case["result"]).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # one of its libraries' threads aborted the process at its end, now and then


if __name__ == "__main__":
    main(sys.argv[1])
