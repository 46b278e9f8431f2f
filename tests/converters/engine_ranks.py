"""One rank of test_engine_round_trip.py: for each case build an engine from a Hugging Face folder, checkpoint it.

Started as `python engine_ranks.py RANK WORLD_SIZE CASES.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from swift_dist.checkpoint import CheckpointWriter
from swift_dist.config import JobConfig
from swift_dist.engines import build_engine


def main(rank: int, world_size: int, cases: list[dict[str, Any]]) -> None:
    for case in cases:
        run_dir = Path(case["run_dir"])
        worker = SimpleNamespace(
            rank=rank,
            world_size=world_size,
            local_rank=rank,
            local_world_size=world_size,
            node_rank=0,
            attempt=0,
            device="cpu",
            run_dir=run_dir,
            store=lambda path=run_dir / "store": dist.FileStore(str(path), world_size),
            beat=lambda phase, step: None,
            stop_requested=lambda: False,
        )
        job = JobConfig.model_validate(case["job"])
        engine = build_engine(job, case["hf_config"], worker)  # type: ignore[arg-type]
        try:
            engine.load_pretrained(Path(case["folder"]))
            writer = CheckpointWriter(run_dir / "checkpoints", keep=1, keep_every=0, attempt=0, async_save=False)
            metadata = {"content_metadata": engine.content_metadata, "hf_config": case["hf_config"]}
            writer.save(1, engine.sharded_state_dict(), metadata)
            writer.wait()
            writer.close()
        finally:
            engine.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))
