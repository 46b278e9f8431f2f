"""A dataset and a job that train in seconds: for tests of whole runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from swift_dist.data.store import write_index

STEPS, INTERVAL = 40, 4
"""Of the run that is disturbed: its steps, and those between two checkpoints."""

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_dropout": 0.1,
}


@dataclass(frozen=True)
class Run:
    """A job of two tensor-parallel ranks with dropout and a checkpoint every few steps, and where it went."""

    words: tuple[str, ...]
    output: Path


def write_dataset(prefix: Path, seed: int = 0) -> str:
    """400 documents of tokens below 250, written as Megatron's builder does; returns the prefix."""
    generator = np.random.default_rng(seed)
    documents = [np.cumsum(generator.integers(0, 3, size=n)) % 250 for n in generator.integers(20, 200, size=400)]
    Path(f"{prefix}.bin").write_bytes(np.concatenate(documents).astype("<u2").tobytes())
    with Path(f"{prefix}.idx").open("wb") as stream:
        write_index(stream, np.array([len(d) for d in documents], dtype=np.int32), np.uint16)
    return str(prefix)


def job(data: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """A job over that dataset; keyword arguments add to its sections (None removes one)."""
    values: dict[str, dict[str, Any]] = {
        "model": {"config": MODEL},
        "data": {"train": [data], "sequence_length": 64},
        "train": {"steps": 10, "micro_batch_size": 2, "global_batch_size": 8, "precision": "fp32"},
    }
    for name, keys in sections.items():
        values[name] = {**values.get(name, {}), **keys}
    return values


def write_job(path: Path, values: Any) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)
