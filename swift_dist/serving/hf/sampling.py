"""From a step's logits to each row's next token, every row by its own options and its own random numbers.

The order is vLLM's: guide, bias and end tokens, penalties, temperature, min_p, top_k, top_p; log-probabilities are of
the untouched logits (its `raw_logprobs`, the default there).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from swift_dist.serving.hf.requests import Sampling


@dataclass
class RowSampler:
    """What sampling remembers of one sequence.

    Attributes:
        seen: token ids of prompt and answer, for the repetition penalty.
        counts: of each token id in the answer.
        ends: ids that end the answer.
        matcher: of a guide, already past the answer's tokens.
        draws: random numbers of this row alone.
    """

    options: Sampling
    prompt: Sequence[int]
    ends: tuple[int, ...]
    draws: torch.Generator
    matcher: Any = None
    counts: dict[int, int] = field(default_factory=dict)
    length: int = 0

    @property
    def plain(self) -> bool:
        """Whether the logits' maximum is the answer."""
        o = self.options
        changed = o.repetition_penalty != 1 or o.presence_penalty or o.frequency_penalty or o.logit_bias
        return o.temperature == 0 and not changed and self.matcher is None and self.length >= o.min_tokens

    def took(self, token: int) -> None:
        """A token was drawn."""
        self.counts[token] = self.counts.get(token, 0) + 1
        self.length += 1
        if self.matcher is not None:
            self.matcher.consume_token(token)


class Drawn(NamedTuple):
    """A row's token; its log-probability and the most probable tokens (id, logprob), where asked for."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


def draw(logits: torch.Tensor, rows: Sequence[RowSampler], guides: Any) -> list[Drawn]:
    """The next token of each row; the rows' own states are left as they are (`RowSampler.took`).

    Args:
        logits: [rows, vocabulary] in float32.
        guides: `guides.Guides`, where a row has a matcher.
    """
    tokens = logits.argmax(-1).tolist()
    changed = [at for at, row in enumerate(rows) if not row.plain]
    if changed:
        some = [rows[at] for at in changed]
        own = logits[torch.tensor(changed, device=logits.device)]
        for at, token in zip(changed, _choose(shaped(own, some, guides), some), strict=True):
            tokens[at] = token
    reports = report(logits, tokens, [row.options.logprobs for row in rows])
    return [Drawn(token, *found) for token, found in zip(tokens, reports, strict=True)]


def report(
    logits: torch.Tensor, tokens: Sequence[int], wanted: Sequence[int | None]
) -> list[tuple[float | None, list[tuple[int, float]]]]:
    """Log-probabilities of chosen tokens, and the most probable ones: (logprob, [(id, logprob), ...]) a row.

    Args:
        logits: [rows, vocabulary] in float32.
        wanted: how many alternatives of each row; None: nothing.
    """
    found: list[tuple[float | None, list[tuple[int, float]]]] = [(None, [])] * len(tokens)
    asked = [at for at, number in enumerate(wanted) if number is not None]
    if not asked:
        return found
    logprobs = logits[torch.tensor(asked, device=logits.device)].log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor([[tokens[at]] for at in asked], device=logits.device)).squeeze(1).tolist()
    most = min(max(wanted[at] or 0 for at in asked), logits.shape[1])
    values, ids = (part.tolist() for part in logprobs.topk(most, -1)) if most else ([[]] * len(asked),) * 2
    for place, at in enumerate(asked):
        number = wanted[at] or 0
        found[at] = (chosen[place], list(zip(ids[place][:number], values[place][:number], strict=True)))
    return found


def shaped(logits: torch.Tensor, rows: Sequence[RowSampler], guides: Any) -> torch.Tensor:
    """Logits after guide, bias, end tokens and penalties; a new tensor."""
    logits = logits.clone()
    guided = [at for at, row in enumerate(rows) if row.matcher is not None]
    if guided:
        allowed = guides.allowed([rows[at].matcher for at in guided]).to(logits.device)
        places = torch.tensor(guided, device=logits.device)
        logits[places] = logits[places].masked_fill(~allowed, -torch.inf)
    for at, row in enumerate(rows):
        _shape_row(logits[at], row)
    return logits


def _shape_row(logits: torch.Tensor, row: RowSampler) -> None:
    """One row's bias, end tokens and penalties, in place. [vocabulary]"""
    options = row.options
    if options.logit_bias:
        ids = torch.tensor(list(options.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(options.logit_bias.values()), dtype=logits.dtype, device=logits.device)
    if row.length < options.min_tokens and row.ends:
        ends = torch.tensor(row.ends, device=logits.device)
        kept = logits[ends]
        logits[ends] = -torch.inf
        if bool(torch.isinf(logits).all()):  # a guide that is complete leaves nothing but the end
            logits[ends] = kept
    if options.repetition_penalty != 1:
        # A token counts once, however often it came (transformers' RepetitionPenaltyLogitsProcessor).
        ids = torch.tensor(sorted({*row.prompt, *row.counts}), device=logits.device)
        some = logits[ids]
        logits[ids] = torch.where(some > 0, some / options.repetition_penalty, some * options.repetition_penalty)
    if row.counts and (options.frequency_penalty or options.presence_penalty):
        ids = torch.tensor(list(row.counts), device=logits.device)
        often = torch.tensor(list(row.counts.values()), dtype=logits.dtype, device=logits.device)
        logits[ids] -= options.frequency_penalty * often + options.presence_penalty


def _choose(logits: torch.Tensor, rows: Sequence[RowSampler]) -> list[int]:
    """Greedy rows' maximum, the others' draw. [rows, vocabulary]"""
    tokens = logits.argmax(-1).tolist()
    drawn = [at for at, row in enumerate(rows) if row.options.temperature > 0]
    if not drawn:
        return tokens
    some = [rows[at] for at in drawn]
    weights = _weights(logits[torch.tensor(drawn, device=logits.device)], [row.options for row in some])
    # One number a row and the inverse of its distribution: what a row draws depends on nothing else in the batch.
    uniform = torch.stack([torch.rand(1, generator=row.draws, dtype=torch.float64) for row in some])
    sums = weights.double().cumsum(-1)
    goal = uniform.to(logits.device) * sums[:, -1:]
    goal = torch.minimum(goal, torch.nextafter(sums[:, -1:], torch.zeros_like(goal)))
    for at, token in zip(drawn, torch.searchsorted(sums, goal, right=True).squeeze(1).tolist(), strict=True):
        tokens[at] = token
    return tokens


def _weights(logits: torch.Tensor, options: Sequence[Sampling]) -> torch.Tensor:
    """Probabilities, not normalised, after temperature, min_p, top_k and top_p. [rows, vocabulary]"""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=logits.dtype, device=logits.device)[:, None]

    logits = logits / column([max(o.temperature, 1e-5) for o in options])
    if any(o.min_p > 0 for o in options):
        chances = logits.softmax(-1)
        logits = logits.masked_fill(
            chances < column([o.min_p for o in options]) * chances.amax(-1, keepdim=True), -torch.inf
        )
    if not any(o.top_k > 0 or o.top_p < 1 for o in options):
        return logits.softmax(-1)
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    places = torch.arange(logits.shape[1], device=logits.device)[None]
    limits = [o.top_k if o.top_k > 0 else logits.shape[1] for o in options]
    ordered = ordered.masked_fill(places >= torch.tensor(limits, device=logits.device)[:, None], -torch.inf)
    chances = ordered.softmax(-1)
    # The token that carries the sum over the line stays; the first one always does.
    before = chances.cumsum(-1) - chances
    cut = (before >= column([o.top_p for o in options])) & (places > 0)
    # top_p = 1 keeps everything, whatever rounding made of the sum
    cut &= column([float(o.top_p < 1) for o in options]).bool()
    return torch.zeros_like(chances).scatter_(1, ids, chances.masked_fill(cut, 0))
