"""Texts for the tests, and what megatron.core's own builder makes of them."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer

WORDS = "the of and to in a is that for it was on Räder 漢字 текст naïve 🙂 def return self.x = \t{}; é\u2028 x".split(
    " "
)


def texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Documents of words in several scripts, with newlines, some of them empty or of one character."""
    draw = random.Random(seed)
    documents = []
    for k in range(count):
        if k % 17 == 5:
            documents.append("" if k % 2 else "x")
            continue
        words = [draw.choice(WORDS) for _ in range(draw.randint(1, longest))]
        documents.append("".join(word + draw.choice(["  ", " ", "\n", " "]) for word in words))
    return documents


def jsonl(documents: Sequence[str], ascii_only: bool = False) -> bytes:
    rows = (json.dumps({"id": k, "text": text}, ensure_ascii=ascii_only) for k, text in enumerate(documents))
    return ("\n".join(rows) + "\n").encode()


def compress(data: bytes, suffix: str, members: int = 1) -> bytes:
    """.gz or .zst of several members that follow each other."""
    if not suffix:
        return data
    pieces = [data[len(data) * k // members : len(data) * (k + 1) // members] for k in range(members)]
    squeeze = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    return b"".join(squeeze(piece) for piece in pieces)


def megatron(prefix: Path, documents: Sequence[str], tokenizer: str, eod: bool = False) -> tuple[bytes, bytes]:
    """(.bin, .idx) that megatron's builder writes for these documents, each encoded on its own."""
    encoder = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for text in documents:
        ids = encoder.encode(text).ids + ([encoder.token_to_id("<|endoftext|>")] if eod else [])
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return files(prefix)


def files(prefix: Path | str) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def stored(prefix: Path | str) -> list[tuple[int, ...]]:
    """The documents of a dataset, as megatron reads them."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(str(prefix))
    return [tuple(data[k].tolist()) for k in range(len(data))]
