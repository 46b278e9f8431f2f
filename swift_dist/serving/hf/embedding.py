"""Embeddings: a model without its head, in a thread of its own, asked from an event loop as `generator.Generator` is.

How the hidden states become one vector is read from the folder where sentence-transformers wrote it (modules.json);
else it is what vLLM takes: the last token of a decoder, the first of an encoder, of length 1.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from swift_dist.errors import JobError
from swift_dist.serving.hf import model as models
from swift_dist.serving.hf.requests import Event, GeneratorFailed, Sampling
from swift_dist.serving.options import ServedModel

Pooling = Literal["last", "mean", "cls"]
BATCH_TOKENS = 8192  # of texts in one forward, padding included
_MODES = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}


@dataclass(frozen=True)
class Pooled:
    """How a text's vector is made of its tokens' [tokens, hidden], and whether its length becomes 1."""

    pooling: Pooling
    normalize: bool = True


class Embedder:
    """Vectors from one model (`requests.TextGenerator`, without its text).

    Args:
        served: the model and its options.

    Raises:
        JobError, RunError: it cannot be served so.
    """

    adapters: tuple[str, ...] = ()
    error: BaseException | None = None  # a batch that fails is its request's error; the thread goes on

    def __init__(self, served: ServedModel) -> None:
        if served.adapters:
            raise JobError("adapters", "the hf engine embeds with the model alone", "merge the adapter first")
        loaded = models.load(served)
        self.tokenizer, self.model_max_length = loaded.tokenizer, _length(served.path, loaded)
        self._model, self._device = loaded.model, loaded.device
        self._vocabulary = loaded.vocabulary
        self._pooled = pooled_of(served.path, loaded.model)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="hf-embedder")
        self._asked, self._closed = 0, False
        self._computing = 0

    @property
    def running(self) -> int:
        return self._computing

    @property
    def waiting(self) -> int:
        return max(self._asked - self._computing, 0)

    def submit(self, prompt: list[int], sampling: Sampling, adapter: str | None = None) -> AsyncIterator[Event]:
        raise ValueError("this model is served for embeddings; start it with --task generate for text")

    async def embed(self, prompts: list[list[int]]) -> list[list[float]]:
        """One vector a prompt, in their order.

        Raises:
            ValueError: a prompt is empty or too long, or a token is none of the model's.
            GeneratorFailed: the engine is closed.
        """
        if self._closed:
            raise GeneratorFailed("the engine is closed")
        self._check(prompts)
        vectors: list[list[float]] = [[]] * len(prompts)
        # A batch at a time, so that a large request does not keep a small one waiting.
        for places in _batches([len(prompt) for prompt in prompts]):
            self._asked += 1
            try:
                found = await asyncio.get_running_loop().run_in_executor(
                    self._worker, self._vectors, [prompts[at] for at in places]
                )
            except RuntimeError as error:
                if not self._closed:
                    raise
                raise GeneratorFailed("the engine is closed") from error
            finally:
                self._asked -= 1
            for at, vector in zip(places, found, strict=True):
                vectors[at] = vector
        return vectors

    async def load_adapter(self, name: str, path: str) -> None:
        raise ValueError("the hf engine embeds with the model alone: merge the adapter first")

    async def unload_adapter(self, name: str) -> None:
        raise KeyError(name)

    def close(self) -> None:
        """End the thread, after the batches that are asked of it."""
        self._closed = True
        self._worker.shutdown(wait=True)

    def _check(self, prompts: list[list[int]]) -> None:
        for prompt in prompts:
            if not prompt:
                raise ValueError("a prompt is empty")
            if len(prompt) > self.model_max_length:
                raise ValueError(f"a prompt has {len(prompt)} tokens; the model takes {self.model_max_length}")
            if outside := [i for i in prompt if not 0 <= i < self._vocabulary]:
                raise ValueError(f"{outside[0]} is no token of this model ({self._vocabulary} tokens)")

    def _vectors(self, prompts: list[list[int]]) -> list[list[float]]:
        """One batch, padded on the right: causal models see no padding, the others are told of it."""
        self._computing += 1
        try:
            longest = max(map(len, prompts))
            ids = torch.zeros(len(prompts), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(prompts):
                ids[row, : len(prompt)] = torch.tensor(prompt)
                mask[row, : len(prompt)] = 1
            ids, mask = ids.to(self._device), mask.to(self._device)
            with torch.inference_mode():
                hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
                return pool(hidden, mask, self._pooled).tolist()
        finally:
            self._computing -= 1


def _length(path: str, loaded: models.Loaded) -> int:
    """Tokens of a text: fewer than positions where those begin after the padding's (RoBERTa), or the folder says so."""
    length = loaded.length
    for name, module in loaded.model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            length = min(length, module.num_embeddings - module.padding_idx - 1)
    file = Path(path) / "sentence_bert_config.json"
    said = json.loads(file.read_text(encoding="utf-8")).get("max_seq_length") if file.is_file() else None
    return min(length, said or length)


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooled: Pooled) -> torch.Tensor:
    """Hidden states [texts, tokens, hidden], padded on the right, to vectors [texts, hidden]. mask: [texts, tokens]"""
    if pooled.pooling == "cls":
        vectors = hidden[:, 0]
    elif pooled.pooling == "last":
        vectors = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    else:
        vectors = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(vectors, dim=-1) if pooled.normalize else vectors


def pooled_of(path: str, model: Any) -> Pooled:
    """What the folder says, or what vLLM takes where it says nothing.

    Raises:
        JobError: its sentence-transformers modules are more than pooling and normalising.
    """
    folder = Path(path)
    if not (folder / "modules.json").is_file():
        return Pooled("cls" if _looks_ahead(model) else "last")
    pooling: Pooling | None = None
    normalize = False
    for module in json.loads((folder / "modules.json").read_text(encoding="utf-8")):
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            pooling = _pooling(folder / module["path"] / "config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise JobError("model", f"its modules.json has a {kind}, which the hf engine cannot compute", "use vllm")
    if pooling is None:
        raise JobError("model", "its modules.json has no Pooling", "take the folder that sentence-transformers wrote")
    return Pooled(pooling, normalize)


def _pooling(file: Path) -> Pooling:
    """The one pooling of a sentence-transformers configuration."""
    values = json.loads(file.read_text(encoding="utf-8"))
    named = values.get("pooling_mode")  # its newer versions write a name
    chosen = (
        [named] if isinstance(named, str) else [k for k, v in values.items() if k.startswith("pooling_mode_") and v]
    )
    known: list[Pooling] = [p for p in get_args(Pooling) if chosen in ([p], [f"{p}token"])]
    known += [p for key, p in _MODES.items() if chosen == [key]]  # type: ignore[misc]
    if not known:
        raise JobError("model", f"{file}: pooling by {', '.join(map(str, chosen))} is not computed", "use vllm")
    return known[0]


@torch.inference_mode()
def _looks_ahead(model: Any) -> bool:
    """Whether a token sees those after it: whether the first one's state depends on the second."""
    ids = torch.tensor([[3, 4], [3, 5]], device=next(model.parameters()).device)
    first = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0].float()
    return not torch.allclose(first[0], first[1], rtol=1e-3, atol=1e-5)


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Places of texts of about the same length, so that little is padding."""
    batches: list[list[int]] = []
    for at in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= BATCH_TOKENS:
            batches[-1].append(at)
        else:
            batches.append([at])
    return batches
