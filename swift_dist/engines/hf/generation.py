"""Answers of the model under way to validation samples, token by token, the likeliest each time.

Each token is one forward pass of the whole rows, as training does it: packed, shared, sharded as the job says, without
a cache of keys and values. So it costs a forward pass a token, and needs no more memory than an evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from swift_dist.data.samples.collate import Collator, empty_example
from swift_dist.data.samples.dataset import Example
from swift_dist.data.templates.base import Encoded
from swift_dist.engines.base import MicroBatch
from swift_dist.engines.hf.batches import parted, prepare
from swift_dist.engines.hf.tokenizer import tokenizer_of

if TYPE_CHECKING:
    from swift_dist.engines.hf.engine import HFEngine

PROMPT_CHARACTERS = 2000
"""So much of a prompt's end is written down."""


@dataclass
class Prompt:
    """What is to be answered.

    Args:
        number: of the sequence among all of the job's.
        ids: tokens before the last run of tokens that learn; expected: those.
        answer: tokens so far.
    """

    number: int
    ids: list[int]
    expected: list[int]
    answer: list[int] = field(default_factory=list)


def prompts_of(batches: Iterable[list[MicroBatch]]) -> Iterator[Prompt]:
    """One of each sample of these micro-batches that learns something; of a pair, of what was chosen."""
    for whole in (batch for micro_batches in batches for batch in micro_batches):
        batch, _ = parted(whole)
        each = len(batch["lengths"]) // max(1, len(batch["sample_weights"]))
        for place in range(0, len(batch["lengths"]), each):
            here = batch["segments"] == place
            tokens, learns = batch["tokens"][here].tolist(), batch["weights"][here] > 0  # weights: of the next token
            number, places = int(batch["numbers"][place]), learns.nonzero().squeeze(1)
            if number < 0 or not len(places):
                continue
            end = int(places[-1]) + 1
            earlier = (~learns[:end]).nonzero().squeeze(1)
            begin = int(earlier[-1]) + 1 if len(earlier) else 0
            yield Prompt(number, tokens[: begin + 1], tokens[begin + 1 : end + 1])


class Answering:
    """Answers the first `train.eval_answers` samples of an evaluation (in the order of their rows).

    Args:
        engine: whose model answers, whichever way it is shared out.
    """

    def __init__(self, engine: HFEngine) -> None:
        self._engine, self._train = engine, engine.job.train
        self._tokenizer = tokenizer_of(engine.job)
        model: Any = engine.model
        config = model.config.get_text_config()
        stated = (getattr(getattr(model, "generation_config", None), "eos_token_id", None), config.eos_token_id)
        known = [self._tokenizer.eos_token_id] if self._tokenizer is not None else []
        for ids in stated:
            known += ids if isinstance(ids, list) else [ids]
        self._ends = {int(number) for number in known if number is not None}
        self._special = set(self._tokenizer.all_special_ids) if self._tokenizer is not None else set()
        self._longest = getattr(config, "max_position_embeddings", None) or float("inf")
        self._collate = Collator(engine.batch_layout, engine.pad_id)

    def __call__(self, batches: list[list[MicroBatch]]) -> list[dict[str, Any]]:
        """Collective; without gradient, in evaluation mode.

        Args:
            batches: this rank's micro-batches of an evaluation.

        Returns:
            Of each sample, in their order, on every rank: number, prompt (its end), expected, answer: as text, or as
            tokens where there is no tokenizer.
        """
        found = {prompt.number: prompt for prompt in prompts_of(batches)}
        chosen = sorted(set().union(*_gathered(list(found))))[: self._train.eval_answers]
        prompts = [found[number] for number in chosen if number in found]
        self._answer(prompts)
        sharing = self._engine.sharing
        rows = [self._row(prompt) for prompt in prompts] if sharing is None or sharing.rank == 0 else []
        return sorted((row for part in _gathered(rows) for row in part), key=lambda row: row["number"])

    def _answer(self, prompts: list[Prompt]) -> None:
        """No more rows at a time than a step has. Ranks compute together: each goes on until all are done."""
        waiting, under_way = list(prompts), list[Prompt]()
        while True:
            while waiting and len(under_way) < self._train.micro_batch_size:
                under_way.append(waiting.pop(0))
            busy = torch.tensor(len(under_way), device=self._engine.device)
            dist.all_reduce(busy)
            if not busy:
                return
            for prompt, token in zip(under_way, self._next_tokens(under_way), strict=True):
                prompt.answer.append(token)
            under_way = [prompt for prompt in under_way if not self._is_done(prompt)]

    def _next_tokens(self, prompts: list[Prompt]) -> list[int]:
        engine = self._engine
        examples = [_question([*prompt.ids, *prompt.answer], engine.pad_id) for prompt in prompts]
        batch = self._collate(examples or [empty_example(1, engine.pad_id)])
        prepared = prepare(batch, engine.device, engine.objective.needs, engine.sharing)
        tokens: list[int] = engine.forward.likeliest(engine.strategy.module, prepared).tolist()
        return tokens

    def _is_done(self, prompt: Prompt) -> bool:
        last, own_end = prompt.answer[-1], prompt.expected[-1]  # a template's end of a turn may be no end of a text
        if last in self._ends or (last == own_end and own_end in self._special):
            return True
        length = len(prompt.ids) + len(prompt.answer)
        return len(prompt.answer) >= self._train.eval_answer_tokens or length >= self._longest

    def _row(self, prompt: Prompt) -> dict[str, Any]:
        def read(ids: list[int]) -> Any:
            return ids if self._tokenizer is None else self._tokenizer.decode(ids)

        return {
            "number": prompt.number,
            "prompt": read(prompt.ids)[-PROMPT_CHARACTERS:],
            "expected": read(prompt.expected),
            "answer": read(prompt.answer),
        }


def _question(ids: list[int], pad_id: int) -> Example:
    """A sequence of which nothing counts but what comes after its end. (There stands a token that nothing sees.)"""
    weights = np.zeros(len(ids) + 1, np.float32)
    weights[-1] = 1
    return Example((Encoded(np.array([*ids, pad_id], np.int32), weights),))


def _gathered(values: list[Any]) -> list[list[Any]]:
    """Of every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, values)
    return found
