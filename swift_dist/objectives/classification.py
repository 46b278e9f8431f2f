r"""Classes of, or numbers for, whole sequences; the problem types of transformers' ``...ForSequenceClassification``.

    single_label_classification  L = 1/S * sum over sequences of -log softmax(scores)[label]
    multi_label_classification   L = 1/S * sum over sequences of the mean over classes of the binary cross-entropy
    regression                   L = 1/S * sum over sequences of the mean over outputs of (score - label)^2

`count` is S, the number of real sequences. The labels' tensor says which of them it is: class numbers, int64 [S]; which
classes apply, bool [S, num_labels]; numbers, floating [S, num_labels]. `label_tensor` makes it of rows' labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from swift_dist.errors import JobError
from swift_dist.objectives._sequences import count_samples, in_float32, mean_of, real_samples
from swift_dist.objectives.base import Batch, Loss, Objective

if TYPE_CHECKING:
    import torch

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]


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

    if labels.is_floating_point():
        errors = scores - labels.reshape(scores.shape).to(scores.dtype)
        losses = (errors**2).mean(1)
        return losses, {"mse": mean_of(losses), "mae": mean_of(errors.abs().mean(1))}
    if labels.dtype == torch.bool:
        assert labels.shape == scores.shape
        wanted = labels.to(scores.dtype)
        losses = functional.binary_cross_entropy_with_logits(scores, wanted, reduction="none").mean(1)
        given = scores.detach() > 0
        hits = (given & labels).sum().to(scores.dtype)
        return losses, {
            "accuracy": mean_of((given == labels).all(1).to(scores.dtype)),
            "f1_micro": (2 * hits, (given.sum() + labels.sum()).to(scores.dtype)),
        }
    losses = functional.cross_entropy(scores, labels, reduction="none")
    return losses, {"accuracy": mean_of((scores.argmax(1) == labels).to(scores.dtype))}


def problem_type(label: Any, num_labels: int) -> ProblemType:
    """What a row's label asks of a model with `num_labels` outputs where nothing else says it, as in transformers: a
    number where there is one output, a class number, or the list of those that apply."""
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if isinstance(label, (list, tuple)) else "single_label_classification"


def label_tensor(labels: Sequence[Any], num_labels: int, kind: ProblemType) -> torch.Tensor:
    """The labels of a micro-batch as `loss` takes them.

    Args:
        labels: a row's label each: a class number, a list of class numbers (none: no class applies), or a number or a
            list of `num_labels` numbers; None for a sequence that fills the batch up.
        num_labels: outputs of the model.
        kind: what the model is asked.

    Raises:
        JobError: a label is not of that kind, or names a class that the model does not have.
    """
    import torch

    if kind == "regression":
        rows = [[0.0] * num_labels if label is None else _numbers(label, num_labels) for label in labels]
        return torch.tensor(rows, dtype=torch.float32).reshape(len(labels), num_labels)
    if kind == "single_label_classification":
        return torch.tensor([0 if x is None else _class_number(x, num_labels) for x in labels], dtype=torch.int64)
    several = torch.zeros((len(labels), num_labels), dtype=torch.bool)
    for row, label in enumerate(labels):
        if label is not None and not isinstance(label, (list, tuple)):
            raise _wrong(label, f"no list of class numbers, which {kind} takes")
        for number in label or ():
            several[row, _class_number(number, num_labels)] = True
    return several


def _class_number(label: Any, num_labels: int) -> int:
    if isinstance(label, bool) or not (isinstance(label, int) or (isinstance(label, float) and label.is_integer())):
        raise _wrong(label, "no class number")
    if not 0 <= label < num_labels:
        raise _wrong(label, f"not one of the model's {num_labels} classes, 0 to {num_labels - 1}")
    return int(label)


def _numbers(label: Any, num_labels: int) -> list[float]:
    numbers = list(label) if isinstance(label, (list, tuple)) else [label]
    if len(numbers) != num_labels or any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in numbers):
        raise _wrong(label, f"not what a regression to {num_labels} number{'s' * (num_labels > 1)} takes")
    return [float(number) for number in numbers]


def _wrong(label: Any, what: str) -> JobError:
    return JobError(
        "data.train", f"label {label!r} is {what}", "correct the rows, or set model.num_labels and model.problem_type"
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
