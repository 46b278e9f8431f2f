"""Small datasets for the tests, written by megatron.core's own builder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


def build(prefix: Path, documents: Sequence[Sequence[int]], dtype: type = np.uint16) -> str:
    """Write documents as PREFIX.bin/.idx through megatron; returns the prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def counting(prefix: Path, num_tokens: int, first: int = 0, document: int = 37) -> str:
    """A dataset whose token t is first + t, in documents of uneven length: every sample can be told from its tokens."""
    stream = list(range(first, first + num_tokens))
    documents, start, size = [], 0, document
    while start < num_tokens:
        documents.append(stream[start : start + size])
        start, size = start + size, size % 53 + 11
    return build(prefix, documents, np.int32)
