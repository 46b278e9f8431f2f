"""What an objective is: a loss of per-token log-probabilities (or pooled scores) and weights, normalised by a number
that it is handed. It never sees logits, layouts or process groups: engines own every reduction.

The loss of a step is  sum over the global batch / total,  where ``total`` is the sum of every micro-batch's `count`.
So the same samples give the same loss and gradients on any number of ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Needs = Literal["tokens", "sequence_scores", "token_scores"]


@dataclass(frozen=True)
class Batch:
    """One micro-batch as an objective sees it. Sequences are numbered 0 .. num_sequences - 1; a pair's stand side by
    side (chosen 2i, rejected 2i + 1), other samples are one sequence each. Padding samples have `sample_weights` of 0
    and no weights.

    Args:
        weights: float32 [N], the loss weight of each token that is predicted (never 0).
        segments: int64 [N], the sequence that each belongs to.
        lengths: int64 [num_sequences], tokens of each sequence (prompt and answer).
        sample_weights: float32 [num_samples], 1, or 0 for a sample that only fills a batch up.
        labels: [num_sequences] or, for token classification, [N]; as the rows say: integer, of several classes bool
            [num_sequences, num_labels], of numbers to regress to floating; None where they say nothing.
        logps: float32 [N], log-probability of each such token; with gradient. None before the forward.
        scores: float32 [num_sequences, num_labels] (classification, reward) or [N, num_labels] (token classification).
        reference_logps: float32 [N], the reference model's, without gradient; None where none is needed, or known as:
        reference_sums: float64 [num_sequences], each sequence's sum of weight * `reference_logps`, computed before
            training began (`objective.precompute_reference`). Read neither by yourself: `_sequences.log_ratios`.
        statistics: what `Objective.statistics` added up to over the global batch.
    """

    weights: torch.Tensor
    segments: torch.Tensor
    lengths: torch.Tensor
    sample_weights: torch.Tensor
    labels: torch.Tensor | None = None
    logps: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    reference_logps: torch.Tensor | None = None
    reference_sums: torch.Tensor | None = None
    statistics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """A micro-batch's part of the loss.

    Args:
        value: scalar with gradient; the parts of a global batch add up to its loss.
        metrics: name -> (sum, count), detached; engines add both up over the global batch and report sum / count
            where the count is not 0. The same names on every rank.
    """

    value: torch.Tensor
    metrics: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Objective:
    """One objective; ``OBJECTIVE`` of its file. `options` below is the file's ``Options``.

    Args:
        name: the file's name.
        summary: one line for people, with the paper.
        needs: what the model is to return: log-probabilities of tokens, a score for each sequence, or for each token.
        sample: what a sample is: one sequence, a pair (chosen, rejected), or an answer beside a mismatched one (KTO).
        needs_reference: whether a reference model's log-probabilities are wanted, given the options.
        count: what this micro-batch adds to ``total``; known before any forward.
        loss: (batch, total, options) -> Loss.
        statistics: (batch with logps and the reference's, no gradient) -> numbers to be added up over the global batch
            before any loss is computed; None: the loss needs none. They cost a forward pass of their own: of KTO's
            mismatched answers, which the loss is not computed of; else of the sequences of the loss.
    """

    name: str
    summary: str
    needs: Needs
    sample: Literal["single", "pair", "kto"]
    needs_reference: Callable[[Any], bool]
    count: Callable[[Batch], torch.Tensor]
    loss: Callable[[Batch, torch.Tensor, Any], Loss]
    statistics: Callable[[Batch, Any], dict[str, torch.Tensor]] | None = None
