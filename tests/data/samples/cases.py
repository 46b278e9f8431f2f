"""A tiny tokenizer with a chat template, rows, and stores made without encoding anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from swift_dist.config.job import JobConfig
from swift_dist.data.rows.base import BadRowError, Row
from swift_dist.data.samples.merge import merge
from swift_dist.data.samples.store import SampleKind, SampleStore
from swift_dist.data.samples.truncation import Sample
from swift_dist.data.samples.unit_encoder import _Arrays, content_hash, write_part
from swift_dist.data.templates.base import Encoded

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer without merges (a token a byte) that writes ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: k for k, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return folder


def conversation(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_rows(path: Path, rows: Sequence[dict[str, Any] | str]) -> Path:
    """A jsonl file; text stands as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def job(**sections: dict[str, Any]) -> JobConfig:
    return JobConfig.model_validate({"task": "sft", **sections})


def sequence(length: int, first: int = 0, weights: Sequence[float] | None = None) -> Encoded:
    """Tokens first, first + 1, ..., of which the second half learns."""
    ids = np.arange(first, first + length, dtype=np.int32)
    if weights is None:
        weights = [float(place >= max(1, length // 2)) for place in range(length)]
    return Encoded(ids, np.array(weights, np.float32))


def make_store(
    folder: Path, samples: Sequence[Sample], kind: SampleKind = "single", length: int = 1 << 20, **entry: Any
) -> SampleStore:
    """A store of these samples, in two parts."""
    folder.mkdir(parents=True)
    (folder / "parts").mkdir()
    parts = []
    for number, these in enumerate((samples[: len(samples) // 2], samples[len(samples) // 2 :])):
        arrays = _Arrays()
        for sample in these:
            arrays.rows += 1
            arrays.add(sample, content_hash(*(sequence.ids for sequence in sample.sequences)))
        parts.append(folder / "parts" / f"{number}.npz")
        write_part(parts[-1], arrays)
    merge(parts, folder, kind=kind, sequence_length=length, key="data.train", name=folder.name)
    return SampleStore(folder, folder.name, **entry)


def numbered(folder: Path, lengths: Sequence[int], **entry: Any) -> SampleStore:
    """Single samples whose tokens all are the sample's number."""
    samples = [
        Sample((Encoded(np.full(length, k, np.int32), np.array([0.0] + [1.0] * (length - 1), np.float32)),))
        for k, length in enumerate(lengths)
    ]
    return make_store(folder, samples, **entry)


class ByteTemplate:
    """A template whose tokens are bytes: ``question|answer``, of which the answer learns. "bad" cannot be encoded."""

    def check(self) -> None: ...

    def encode(self, row: Row) -> Encoded:
        if row.text is not None:
            return self.encode_text(row.text)
        return self._of(row.messages[0]["content"] + "|", row.messages[-1]["content"])

    def encode_all(self, row: Row) -> list[Encoded]:
        return [self.encode(row)]

    def encode_text(self, text: str) -> Encoded:
        return self._of("", text)

    def encode_pair(self, row: Row) -> tuple[Encoded, Encoded]:
        return self.encode(row), self._of(row.messages[0]["content"] + "|", row.rejected[-1]["content"])

    def encode_prompt_and(self, row: Row, answer_of: Row) -> Encoded:
        return self._of(row.messages[0]["content"] + "|", answer_of.messages[-1]["content"])

    def encode_words(self, row: Row) -> Encoded:
        text = " " + (row.text or "")
        starts = [float(text[k] == " ") for k in range(len(text) - 1)]
        return Encoded(self._of(row.text or "", "").ids, np.array(starts, np.float32))

    def _of(self, prompt: str, answer: str) -> Encoded:
        if "bad" in prompt + answer:
            raise BadRowError("the template refuses it")
        ids = np.frombuffer((prompt + answer).encode(), np.uint8).astype(np.int32)
        return Encoded(ids, np.array([0.0] * len(prompt) + [1.0] * len(answer), np.float32))


def text_of(encoded: Encoded) -> str:
    """What `ByteTemplate` encoded, the part that learns in capitals."""
    letters = zip(encoded.ids.tolist(), encoded.weights.tolist(), strict=True)
    return "".join(chr(token).upper() if weight else chr(token) for token, weight in letters)
