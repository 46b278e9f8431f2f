"""Asking the hf engine's generator from a test: a model folder, many requests at once, what came of each."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from swift_dist.serving.hf.requests import Event, Finished, Prompt, Sampling, Token

VOCABULARY = 336  # of the tokenizer that `save_tokenizer` trains, rounded up
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": 2,
    "bos_token_id": 0,
    "pad_token_id": 1,
}
"""Sizes of a small decoder, for transformers' configurations."""


@dataclass
class Answer:
    """Everything that one request gave."""

    tokens: list[Token] = field(default_factory=list)
    prompt: Prompt | None = None
    finished: Finished | None = None

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    def take(self, event: Event) -> None:
        assert self.finished is None
        if isinstance(event, Prompt):
            self.prompt = event
        elif isinstance(event, Finished):
            self.finished = event
        else:
            self.tokens.append(event)


async def asked(generator: Any, prompt: list[int], sampling: Sampling, adapter: str | None = None) -> Answer:
    answer = Answer()
    async for event in generator.submit(prompt, sampling, adapter):
        answer.take(event)
    return answer


def answers(generator: Any, requests: list[tuple]) -> list[Answer]:
    """(prompt, sampling[, adapter]) each, all at the same time."""

    async def every() -> list[Answer]:
        return await asyncio.gather(*(asked(generator, *request) for request in requests))

    return asyncio.run(every())


def prompts(count: int, longest: int = 100, seed: int = 0) -> list[list[int]]:
    """Random tokens of which none is special; the first prompt has a single one."""
    draws = torch.Generator().manual_seed(seed)
    lengths = [1, *torch.randint(1, longest + 1, (count,), generator=draws).tolist()][:count]
    return [torch.randint(4, 320, (length,), generator=draws).tolist() for length in lengths]


def save_model(folder: Path, config: Any, seed: int = 0) -> Path:
    """A random model of this configuration, with a tokenizer."""
    from chat_model import save_tokenizer
    from transformers import AutoModelForCausalLM

    save_tokenizer(folder)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def generated(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """What transformers' own `generate` says, greedily."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
    return out[0, len(prompt) :].tolist()
