r"""Classes of, or numbers for, whole sequences; the problem types of transformers' ``...ForSequenceClassification``.

    single_label_classification  L = 1/S * sum over sequences of -log softmax(scores)[label]
    multi_label_classification   L = 1/S * sum over sequences of the mean over classes of the binary cross-entropy
    regression                   L = 1/S * sum over sequences of the mean over outputs of (score - label)^2

`count` is S, the number of real sequences. The labels' tensor says which of them it is: class numbers, integer [S];
which classes apply, bool [S, num_labels]; numbers, floating [S, num_labels] or [S]. Integers for a model with one
output are numbers, too, as in transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swift_dist.errors import RunError
from swift_dist.objectives._sequences import count_samples, in_float32, mean_of, real_samples
from swift_dist.objectives.base import Batch, Loss, Objective

if TYPE_CHECKING:
    import torch


def loss(batch: Batch, total: torch.Tensor, options: None = None) -> Loss:
    assert batch.scores is not None and batch.labels is not None
    real = real_samples(batch)
    scores, labels = in_float32(batch.scores)[real], batch.labels[real]
    losses, metrics = _losses(scores, labels)
    return Loss(losses.sum() / total, metrics)


def _losses(scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Losses [S] of scores [S, num_labels], and the metrics."""
    import torch
    from torch.nn import functional

    if labels.is_floating_point() or (labels.dtype != torch.bool and scores.shape[1] == 1):
        _check(labels.numel() == scores.numel(), "numbers", labels, scores)
        errors = scores - labels.reshape(scores.shape).to(scores.dtype)
        losses = (errors**2).mean(1)
        return losses, {"mse": mean_of(losses), "mae": mean_of(errors.abs().mean(1))}
    if labels.dtype == torch.bool:
        _check(labels.shape == scores.shape, "which classes apply", labels, scores)
        wanted = labels.to(scores.dtype)
        losses = functional.binary_cross_entropy_with_logits(scores, wanted, reduction="none").mean(1)
        given = scores.detach() > 0
        hits = (given & labels).sum().to(scores.dtype)
        return losses, {
            "accuracy": mean_of((given == labels).all(1).to(scores.dtype)),
            "f1_micro": (2 * hits, (given.sum() + labels.sum()).to(scores.dtype)),
        }
    _check(labels.dim() == 1, "class numbers", labels, scores)
    losses = functional.cross_entropy(scores, labels, reduction="none")
    return losses, {"accuracy": mean_of((scores.argmax(1) == labels).to(scores.dtype))}


def _check(fits: bool, what: str, labels: torch.Tensor, scores: torch.Tensor) -> None:
    if not fits:
        raise RunError(
            f"labels are {what} of shape {list(labels.shape)}, but the model has {scores.shape[1]} outputs",
            "set model.num_labels and model.problem_type to what the rows' labels are",
        )


OBJECTIVE = Objective(
    name="classification",
    summary="classes of whole sequences, one or several, or numbers (regression)",
    needs="sequence_scores",
    sample="single",
    needs_reference=lambda options: False,
    count=count_samples,
    loss=loss,
)
