"""Classes of sequences and of tokens: beside transformers' own heads, and what rows' labels become."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from swift_dist.errors import RunError
from swift_dist.objectives import classification, token_classification
from swift_dist.objectives.base import Batch, Loss

ROWS = [[1, 5, 6, 7], [1, 8], [1, 9, 10, 11, 12, 13], [1, 14, 15], [1, 16, 17], [1, 18]]
SEVERAL = [[1, 0, 0], [0, 1, 1], [0, 0, 0], [0, 0, 1], [1, 1, 1], [0, 1, 0]]
LABELS = {
    "single_label_classification": torch.tensor([0, 2, 1, 1, 0, 2]),
    "multi_label_classification": torch.tensor(SEVERAL, dtype=torch.bool),
    "regression": torch.tensor([[0.5, -1.0, number / 4] for number in range(6)]),
}


def make_model(kind: str, **more: Any) -> torch.nn.Module:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=20, **sizes, initializer_range=0.3, pad_token_id=3, **more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, kind)(config).eval()  # token classification has a dropout


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


INPUTS = {"input_ids": padded(ROWS, 3), "attention_mask": padded([[1] * len(row) for row in ROWS], 0)}


def assert_same(model: torch.nn.Module, theirs: Callable[[], torch.Tensor], mine: Callable[[], Loss]) -> None:
    found = []
    for loss in (theirs(), mine().value):
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append((loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
    assert found[0][1].abs().max() > 1e-2
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", list(LABELS))
def test_sequences_are_classified_as_in_transformers(kind):
    model = make_model("LlamaForSequenceClassification", num_labels=3, problem_type=kind)
    labels = LABELS[kind]
    none = {"weights": torch.ones(0), "segments": torch.zeros(0, dtype=torch.int64), "lengths": torch.ones(len(ROWS))}

    def mine() -> Loss:
        batch = Batch(**none, sample_weights=torch.ones(len(ROWS)), labels=labels, scores=model(**INPUTS).logits)
        return classification.loss(batch, classification.count_samples(batch))

    expected = labels.float() if kind == "multi_label_classification" else labels
    assert_same(model, lambda: model(**INPUTS, labels=expected).loss, mine)


def test_tokens_are_classified_as_in_transformers():
    model = make_model("LlamaForTokenClassification", num_labels=4)
    labels = padded([[-100] + [token % 4 for token in row[1:]] for row in ROWS], -100)  # the first one has no label
    real = INPUTS["attention_mask"].bool()

    def mine() -> Loss:
        segments = torch.arange(len(ROWS))[:, None].expand(real.shape)[real]
        batch = Batch(
            *(torch.ones(int(real.sum())), segments, real.sum(1), torch.ones(len(ROWS))),
            labels=labels[real],
            scores=model(**INPUTS).logits[real],
        )
        return token_classification.loss(batch, token_classification.count(batch))

    assert_same(model, lambda: model(**INPUTS, labels=labels).loss, mine)


def test_metrics_of_classes_by_hand():
    scores = torch.tensor([[1.0, -1.0, 2.0], [-1.0, 3.0, -2.0]])
    common = {"weights": torch.ones(0), "segments": torch.zeros(0, dtype=torch.int64), "scores": scores}
    common |= {"lengths": torch.tensor([4, 4]), "sample_weights": torch.ones(2)}
    several = torch.tensor([[True, True, False], [False, True, False]])
    metrics = classification.loss(Batch(**common, labels=several), torch.tensor(2.0), None).metrics
    assert [float(x) for x in metrics["accuracy"]] == [1, 2]
    assert [float(x) for x in metrics["f1_micro"]] == [4, 6]  # 2 hits of 3 given and 3 wanted
    metrics = classification.loss(Batch(**common, labels=torch.tensor([2, 0])), torch.tensor(2.0), None).metrics
    assert [float(x) for x in metrics["accuracy"]] == [1, 2]


def test_accuracy_of_tokens_leaves_out_those_without_a_label():
    """Even where the model says class 0, which stands in for their label in the loss."""
    scores = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    batch = Batch(
        *(torch.tensor([1.0, 2.0, 1.0]), torch.zeros(3, dtype=torch.int64), torch.tensor([3]), torch.ones(1)),
        labels=torch.tensor([-100, 0, 0]),
        scores=scores,
    )
    metrics = token_classification.loss(batch, token_classification.count(batch)).metrics
    assert [float(x) for x in metrics["accuracy"]] == [1, 2]


def classify(labels: torch.Tensor, num_labels: int) -> Loss:
    count = len(labels)
    none = {"weights": torch.ones(0), "segments": torch.zeros(0, dtype=torch.int64), "lengths": torch.ones(count)}
    scores = torch.arange(float(count * num_labels)).reshape(count, num_labels)
    batch = Batch(**none, sample_weights=torch.ones(count), labels=labels, scores=scores)
    return classification.loss(batch, torch.tensor(float(count)))


def test_integers_for_one_output_are_numbers():
    """Not class numbers, whose loss would be 0 whatever the model says."""
    assert float(classify(torch.tensor([1, 3]), 1).value) == pytest.approx((1 + 4) / 2)
    assert float(classify(torch.tensor([1.0, 3.0]), 1).value) == pytest.approx((1 + 4) / 2)


@pytest.mark.parametrize(
    "labels", [torch.tensor([0.5, 1.0]), torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 3, dtype=torch.int64)]
)
def test_labels_that_the_model_has_no_outputs_for_are_refused(labels):
    with pytest.raises(RunError, match="3 outputs"):
        classify(labels, 3)
