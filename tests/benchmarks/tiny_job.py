"""A tiny job for the benchmarks: random tokens, a Llama of two narrow layers, tensor parallel 2 on CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def write_tiny_job(folder: Path, **sections: dict[str, Any]) -> Path:
    """Write job.json and its data set into `folder`; `sections` replace entries of the job's sections."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(str(folder / "tokens.bin"), dtype=np.int32)
    for length in generator.integers(20, 200, 400):
        document = torch.tensor(generator.integers(1, 256, int(length)), dtype=torch.int32)
        builder.add_document(document, [len(document)])
    builder.finalize(str(folder / "tokens.idx"))
    job: dict[str, Any] = {
        "task": "pretrain",
        "model": {"config": MODEL},
        "data": {"train": [str(folder / "tokens")], "sequence_length": 64},
        "train": {"steps": 20, "micro_batch_size": 2, "global_batch_size": 4, "precision": "fp32"},
        "parallel": {"tensor_model_parallel_size": 2},
        "cluster": {"nproc_per_node": 2, "accelerator": "cpu"},
        "report": {"tensorboard": False},
    }
    for name, values in sections.items():
        job[name] = {**job.get(name, {}), **values}
    path = folder / "job.yaml"
    path.write_text(json.dumps(job))  # JSON is YAML
    return path
