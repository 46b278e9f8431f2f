"""Losses, gradients of the model's weights and metrics, beside TRL's own trainers.

The trainers are real: each is made once, with a tiny random model and a tokenizer trained here, and is given the same
token ids as ours. What differs by definition, and what is done about it here:

- TRL's likelihood terms (DPO's ``sft``, CPO, ORPO) are means over the tokens of a micro-batch, ours means over pairs of
  means over tokens. So TRL is given one pair at a time and its losses are averaged: what its gradient accumulation with
  micro-batches of one does.
- ORPO's likelihood term in TRL includes the prompt. Prompts are one token long here, which nothing predicts.
- Conservative DPO (label_smoothing with sigmoid) is no longer in TRL: it is TRL's loss of both orders of the pair.
- KTO's divergence: TRL's is a micro-batch's, so the global batch is one micro-batch here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl_trainers import PAD, trl_trainers

from swift_dist.config.job import JobConfig
from swift_dist.engines.hf.logps import token_logps
from swift_dist.objectives.base import Batch, Loss
from swift_dist.plugins import find

TOLERANCE = 1e-5
BOS, EOS = 1, 2
Sequence = tuple[list[int], int]  # tokens, and how many of them are the prompt

# (prompt, chosen, rejected): answers of different lengths
PAIRS = [
    ([BOS, 5, 6], [7, 8, 9, EOS], [10, EOS]),
    ([BOS, 11], [12, EOS], [13, 14, 15, 16, EOS]),
    ([BOS, 17, 18, 19], [20, 21, EOS], [22, 23, EOS]),
    ([BOS], [24, 25, 26, 27, 5, EOS], [6, 7, EOS]),
]
SHORT_PAIRS = [([BOS], chosen, rejected) for _, chosen, rejected in PAIRS]
LABELS = [True, False, False, True]


@pytest.fixture(scope="module")
def trl(tmp_path_factory) -> Iterator[SimpleNamespace]:
    with trl_trainers(tmp_path_factory.mktemp("trl")) as trainers:
        yield trainers


def logps_of(model: torch.nn.Module, sequences: list[Sequence]) -> torch.Tensor:
    """[N] of the answers' tokens, each sequence by itself: without padding, without TRL's code."""
    parts = []
    for tokens, prompt in sequences:
        logits = model(input_ids=torch.tensor([tokens])).logits[0]
        parts.append(token_logps(logits[prompt - 1 : -1], torch.tensor(tokens[prompt:])))
    return torch.cat(parts)


def ours(
    name: str,
    options: dict[str, Any],
    model: torch.nn.Module,
    sequences: list[Sequence],
    labels: Any = None,
    reference: Any = None,
    mismatched: list[Sequence] | None = None,
) -> Loss:
    """Loss of a global batch that is one micro-batch."""
    objective = find("swift_dist.objectives", name, "OBJECTIVE")
    section = type(getattr(JobConfig().objective, name))(**options)
    counts = [len(tokens) - prompt for tokens, prompt in sequences]
    num_samples = len(sequences) // (2 if objective.sample == "pair" else 1)
    batch = Batch(
        weights=torch.ones(sum(counts)),
        segments=torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)),
        lengths=torch.tensor([len(tokens) for tokens, _ in sequences]),
        sample_weights=torch.ones(num_samples),
        labels=labels,
    )
    total = objective.count(batch)
    if objective.needs == "tokens":
        batch = replace(batch, logps=logps_of(model, sequences))
    else:
        scores = [model(input_ids=torch.tensor([tokens])).logits for tokens, _ in sequences]
        batch = replace(batch, scores=torch.cat(scores))
    if objective.needs_reference(section):
        with torch.no_grad():
            batch = replace(batch, reference_logps=logps_of(reference, sequences))
    if mismatched is not None:
        with torch.no_grad():
            counts = torch.tensor([len(tokens) - prompt for tokens, prompt in mismatched])
            others = replace(
                batch,
                weights=torch.ones(int(counts.sum())),
                segments=torch.repeat_interleave(torch.arange(len(counts)), counts),
                lengths=torch.tensor([len(tokens) for tokens, _ in mismatched]),
                logps=logps_of(model, mismatched),
                reference_logps=logps_of(reference, mismatched),
            )
            known = {key: float(value) for key, value in objective.statistics(others, section).items()}
        batch = replace(batch, statistics=known)
    return objective.loss(batch, total, section)


def sides(pairs: list[Any]) -> list[Sequence]:
    return [(prompt + answer, len(prompt)) for prompt, *answers in pairs for answer in answers]


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """Of all weights, as one vector."""
    model.zero_grad()
    loss.backward()
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )


def assert_same(model: torch.nn.Module, theirs: Callable[[], torch.Tensor], mine: Callable[[], Loss]) -> Loss:
    """Loss and gradients; the gradients' largest difference beside their largest value."""
    expected = theirs()
    expected_gradients = gradients(model, expected)
    assert expected_gradients.abs().max() > 1e-3
    part = mine()
    assert float(part.value.detach()) == pytest.approx(float(expected.detach()), rel=TOLERANCE, abs=TOLERANCE)
    found = gradients(model, part.value)
    torch.testing.assert_close(
        found, expected_gradients, rtol=0, atol=TOLERANCE * float(expected_gradients.abs().max())
    )
    return part


def assert_same_metrics(part: Loss, theirs: dict[str, float], *names: str) -> None:
    assert names
    for name in names:
        value, count = part.metrics[name]
        assert float(value / count) == pytest.approx(theirs[name], rel=TOLERANCE, abs=TOLERANCE), name


REWARDS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


def latest(trainer: Any) -> dict[str, float]:
    """The metrics of a trainer's last loss."""
    return {name: values[-1] for name, values in trainer._metrics["train"].items()}


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_sft(trl, loss_type):
    trainer, sequences = trl.sft, sides(PAIRS)
    trainer.args.loss_type = loss_type
    rows = [tokens for tokens, _ in sequences]
    labels = [[-100] * prompt + tokens[prompt:] for tokens, prompt in sequences]
    inputs = {"input_ids": padded(rows, PAD), "labels": padded(labels, -100)}
    inputs["attention_mask"] = padded([[1] * len(row) for row in rows], 0)
    count = sum(len(tokens) - prompt for tokens, prompt in sequences)
    for num_items in (None, torch.tensor(count)):  # TRL's own count, and the global batch's that Trainer hands over
        assert_same(
            trainer.model,
            lambda n=num_items: trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=n),
            lambda: ours("causal_lm", {"loss_type": loss_type}, trainer.model, sequences),
        )


def dpo_loss(trainer: Any, pairs: list[Any], **values: Any) -> torch.Tensor:
    defaults = {"beta": 0.1, "loss_types": ["sigmoid"], "loss_weights": [1.0], "label_smoothing": 0.0}
    for name, value in {**defaults, "precompute_ref_logps": False, **values}.items():
        assert hasattr(trainer, name)
        setattr(trainer, name, value)
    rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pair, strict=True)) for pair in pairs]
    batch = trainer.data_collator(rows)
    if trainer.precompute_ref_logps:
        batch |= {f"ref_{side}_logps": torch.zeros(len(pairs)) for side in ("chosen", "rejected")}
    return trainer.compute_loss(trainer.model, batch)


def one_by_one(loss: Callable[[list[Any]], torch.Tensor], pairs: list[Any]) -> torch.Tensor:
    return torch.stack([loss([pair]) for pair in pairs]).mean()


@pytest.mark.parametrize(
    ("loss_type", "beta", "smoothing"),
    [
        *(("sigmoid", 0.1, 0.0), ("hinge", 0.1, 0.0), ("ipo", 0.3, 0.0), ("sigmoid_norm", 2.0, 0.0)),
        *(("robust", 0.2, 0.1), ("exo_pair", 0.2, 0.001), ("nca_pair", 0.2, 0.0), ("bco_pair", 0.2, 0.0)),
        *(("sppo_hard", 0.5, 0.0), ("apo_zero", 0.2, 0.0), ("apo_down", 0.2, 0.0)),
    ],
)
def test_dpo(trl, loss_type, beta, smoothing):
    trainer = trl.dpo
    options = {"loss_type": loss_type, "beta": beta, "label_smoothing": smoothing}
    theirs = {"loss_types": [loss_type], "beta": beta, "label_smoothing": smoothing}
    part = assert_same(
        trainer.model,
        lambda: dpo_loss(trainer, PAIRS, **theirs),
        lambda: ours("dpo", options, trainer.model, sides(PAIRS), reference=trl.reference),
    )
    assert_same_metrics(part, latest(trainer), *REWARDS)


def test_every_shape_of_dpo_is_compared():
    from typing import get_args

    from swift_dist.objectives.dpo import LossType

    (mark,) = test_dpo.pytestmark
    assert sorted(case[0] for case in mark.args[1]) == sorted(get_args(LossType))


def test_conservative_dpo(trl):
    trainer = trl.dpo
    swapped = [(prompt, rejected, chosen) for prompt, chosen, rejected in PAIRS]
    assert_same(
        trainer.model,
        lambda: 0.8 * dpo_loss(trainer, PAIRS) + 0.2 * dpo_loss(trainer, swapped),
        lambda: ours("dpo", {"label_smoothing": 0.2}, trainer.model, sides(PAIRS), reference=trl.reference),
    )


def test_dpo_without_a_reference(trl):
    trainer = trl.dpo
    assert_same(
        trainer.model,
        lambda: dpo_loss(trainer, PAIRS, precompute_ref_logps=True),  # all of them 0
        lambda: ours("dpo", {"reference_free": True}, trainer.model, sides(PAIRS)),
    )


def test_dpo_with_a_likelihood_term(trl):
    trainer = trl.dpo
    both = {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}
    assert_same(
        trainer.model,
        lambda: one_by_one(lambda pairs: dpo_loss(trainer, pairs, **both), PAIRS),
        lambda: ours("dpo", {"rpo_alpha": 0.7}, trainer.model, sides(PAIRS), reference=trl.reference),
    )


def test_kto(trl):
    trainer = trl.kto
    trainer.beta, trainer.desirable_weight, trainer.undesirable_weight = 0.2, 1.3, 0.6
    answers = [chosen if wanted else rejected for (_, chosen, rejected), wanted in zip(PAIRS, LABELS, strict=True)]
    mismatched = [answers[-1], *answers[:-1]]
    rows = [
        {"prompt_ids": pair[0], "completion_ids": answer, "KL_completion_ids": other, "label": label}
        for pair, answer, other, label in zip(PAIRS, answers, mismatched, LABELS, strict=True)
    ]
    sequences, others = (
        [(row["prompt_ids"] + row[name], len(row["prompt_ids"])) for row in rows]
        for name in ("completion_ids", "KL_completion_ids")
    )
    labels = torch.tensor(LABELS)
    options = {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.6}
    part = assert_same(
        trainer.model,
        lambda: trainer.compute_loss(trainer.model, trainer.data_collator(rows)),
        lambda: ours("kto", options, trainer.model, sequences, labels, trl.reference, others),
    )
    names = [name for name in REWARDS if name != "rewards/accuracies"]
    assert latest(trainer)["kl"] > 0
    assert_same_metrics(part, latest(trainer), "kl", *names)


def concatenated(pairs: list[Any]) -> dict[str, torch.Tensor]:
    """A batch as the collator of CPO and ORPO makes it."""
    batch: dict[str, torch.Tensor] = {}
    for side, place in (("chosen", 1), ("rejected", 2)):
        rows = [(pair[0] + pair[place], len(pair[0])) for pair in pairs]
        batch[f"{side}_input_ids"] = padded([tokens for tokens, _ in rows], PAD)
        batch[f"{side}_attention_mask"] = padded([[1] * len(tokens) for tokens, _ in rows], 0)
        batch[f"{side}_labels"] = padded([[-100] * prompt + tokens[prompt:] for tokens, prompt in rows], -100)
    return batch


def cpo_loss(trainer: Any, pairs: list[Any], **values: Any) -> tuple[torch.Tensor, dict[str, float]]:
    defaults = {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "cpo_alpha": 1.0, "simpo_gamma": 0.5}
    for name, value in {**defaults, **values}.items():
        assert hasattr(trainer, name)
        setattr(trainer, name, value)
    return trainer.get_batch_loss_metrics(trainer.model, concatenated(pairs))


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("cpo", {"beta": 0.2, "cpo_alpha": 0.0}),
        ("cpo", {"beta": 0.2, "label_smoothing": 0.1, "cpo_alpha": 0.7}),
        ("cpo", {"loss_type": "hinge", "beta": 0.1}),
        ("cpo", {"loss_type": "ipo", "beta": 0.3}),
        ("simpo", {"beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}),
        ("simpo", {"beta": 1.5, "simpo_gamma": 0.3, "cpo_alpha": 0.7, "label_smoothing": 0.1}),
    ],
)
def test_cpo_and_simpo(trl, name, theirs):
    trainer = trl.cpo
    options = {key.removeprefix("simpo_"): value for key, value in theirs.items()}
    if name == "simpo":
        theirs = {**theirs, "loss_type": "simpo"}
    mine = lambda: ours(name, options, trainer.model, sides(PAIRS))  # noqa: E731
    part = assert_same(
        trainer.model, lambda: one_by_one(lambda pairs: cpo_loss(trainer, pairs, **theirs)[0], PAIRS), mine
    )
    _, metrics = cpo_loss(trainer, PAIRS, **theirs)  # the pairs in one micro-batch: means over pairs are the same
    assert_same_metrics(part, metrics, *REWARDS)
    if not theirs.get("cpo_alpha", 1.0):
        assert_same(trainer.model, lambda: cpo_loss(trainer, PAIRS, **theirs)[0], mine)


def test_orpo(trl):
    trainer = trl.orpo
    trainer.beta = 0.3

    def theirs(pairs: list[Any]) -> tuple[torch.Tensor, dict[str, float]]:
        return trainer.get_batch_loss_metrics(trainer.model, concatenated(pairs))

    part = assert_same(
        trainer.model,
        lambda: one_by_one(lambda pairs: theirs(pairs)[0], SHORT_PAIRS),
        lambda: ours("orpo", {"beta": 0.3}, trainer.model, sides(SHORT_PAIRS)),
    )
    assert_same_metrics(part, theirs(SHORT_PAIRS)[1], *REWARDS, "log_odds_ratio", "log_odds_chosen")


@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_reward(trl, coefficient):
    trainer = trl.reward
    trainer.args.center_rewards_coefficient = coefficient or None
    rows = [{"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected} for prompt, chosen, rejected in PAIRS]
    part = assert_same(
        trainer.model,
        lambda: trainer.compute_loss(trainer.model, trainer.data_collator(rows)),
        lambda: ours("reward", {"center_rewards_coefficient": coefficient}, trainer.model, sides(PAIRS)),
    )
    theirs = latest(trainer)
    renamed = {"rewards/margins": theirs["margin"], "rewards/accuracies": theirs["accuracy"]}
    assert_same_metrics(part, renamed, *renamed)
