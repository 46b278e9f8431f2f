r"""Classes of tokens (named entities, parts of speech), as transformers' ``...ForTokenClassification``.

    L = 1/W * sum_t w_t * -log softmax(scores_t)[label_t],  W = sum_t w_t    over the global batch's labelled tokens

`count` is W, the sum of the labelled tokens' weights. A token whose label is below 0 (-100, where people write it) has
none: it is left out of both sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swift_dist.objectives._sequences import in_float32
from swift_dist.objectives.base import Batch, Loss, Objective

if TYPE_CHECKING:
    import torch


def count(batch: Batch) -> torch.Tensor:
    return _weights(batch).sum()


def loss(batch: Batch, total: torch.Tensor, options: None = None) -> Loss:
    from torch.nn.functional import cross_entropy

    assert batch.scores is not None and batch.labels is not None
    weights, scores, labels = _weights(batch), in_float32(batch.scores), batch.labels.clamp(min=0)
    losses = cross_entropy(scores, labels, reduction="none")
    labelled = (weights > 0).to(weights.dtype)
    hits = (scores.argmax(1) == labels) * labelled
    return Loss((weights * losses).sum() / total, {"accuracy": (hits.sum(), labelled.sum())})


def _weights(batch: Batch) -> torch.Tensor:
    """[N], 0 for tokens without a label."""
    assert batch.labels is not None
    return batch.weights * (batch.labels >= 0)


OBJECTIVE = Objective(
    name="token_classification",
    summary="classes of tokens",
    needs="token_scores",
    sample="single",
    needs_reference=lambda options: False,
    count=count,
    loss=loss,
)
