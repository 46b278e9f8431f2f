"""A global batch has one loss, one gradient and one set of metrics, however it is cut into micro-batches.

Numbers themselves are compared with TRL in test_against_trl.py, with transformers in test_classification.py.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from swift_dist.config.job import JobConfig
from swift_dist.errors import RunError
from swift_dist.objectives import dpo
from swift_dist.objectives.base import Batch, Objective
from swift_dist.plugins import find, names

ROOM = "swift_dist.objectives"
NUM_LABELS = 3
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "causal_lm": [{}, {"loss_type": "dft"}],
    "classification": [{"labels": "single"}, {"labels": "multi"}, {"labels": "numbers"}],
    "cpo": [{}, {"loss_type": "hinge"}, {"loss_type": "ipo"}, {"label_smoothing": 0.1, "cpo_alpha": 0.5}],
    "dpo": [
        *({"loss_type": name, "label_smoothing": 0.1 * (name in dpo.SMOOTHED)} for name in dpo.LossType.__args__),
        {"rpo_alpha": 0.7},
        {"reference_free": True},
    ],
    "kto": [{"desirable_weight": 1.3, "undesirable_weight": 0.6}],
    "orpo": [{}],
    "reward": [{}, {"center_rewards_coefficient": 0.1}],
    "simpo": [{}, {"label_smoothing": 0.1, "cpo_alpha": 0.5}],
    "token_classification": [{}],
}


def options_of(name: str, values: dict[str, Any]) -> Any:
    values = {key: value for key, value in values.items() if key != "labels"}
    section = getattr(JobConfig().objective, name, None)
    return None if section is None else type(section)(**values)


@dataclass
class World:
    """A global batch: every token and every sequence has a number, by which its log-probability and score are found."""

    objective: Objective
    options: Any
    samples: list[list[list[int]]]  # sample -> sequence -> numbers of its tokens
    logps: torch.Tensor
    scores: torch.Tensor
    reference: torch.Tensor
    weights: torch.Tensor
    labels: torch.Tensor

    def batch(
        self, micro: list[int | None], shuffle: random.Random | None = None, *, mismatched: bool = False
    ) -> Batch:
        """A micro-batch of samples; None stands for one that fills it up. Of KTO: their answers, or the mismatched."""
        width = 1 if self.objective.sample == "single" else 2
        sides = [int(mismatched)] if self.objective.sample == "kto" else range(width)
        tokens: list[tuple[int, int]] = []  # (segment, token)
        sequences = []
        for place, sample in enumerate(micro):
            for index, side in enumerate(sides):
                sequences.append(-1 if sample is None else sample * width + side)
                if sample is not None:
                    tokens += [(place * len(sides) + index, token) for token in self.samples[sample][side]]
        if shuffle:
            shuffle.shuffle(tokens)
        segments = torch.tensor([segment for segment, _ in tokens], dtype=torch.int64)
        chosen = torch.tensor([token for _, token in tokens], dtype=torch.int64)
        numbers = torch.tensor(sequences)
        by_token = self.objective.needs == "token_scores"
        batch = Batch(
            weights=self.weights[chosen],
            segments=segments,
            lengths=torch.bincount(segments, minlength=len(sequences)),
            sample_weights=torch.tensor([float(sample is not None) for sample in micro], dtype=torch.float64),
            labels=self.labels[chosen if by_token else numbers],  # padding: those of the last one
        )
        if self.objective.needs_reference(self.options):
            batch = replace(batch, reference_logps=self.reference[chosen])
        if self.objective.needs == "tokens":
            return replace(batch, logps=self.logps[chosen])
        scores = self.scores[chosen if by_token else numbers]
        if not by_token:
            scores = torch.where(numbers[:, None] < 0, 55.0, scores)  # what a model says of padding
        return replace(batch, scores=scores)

    def evaluate(self, cut: list[list[int | None]], shuffle: random.Random | None = None) -> tuple[Any, ...]:
        """(loss, gradients, metrics) of the global batch cut into micro-batches, as an engine computes them."""
        batches = [self.batch(micro, shuffle) for micro in cut]
        total = sum(self.objective.count(batch) for batch in batches)
        sums: dict[str, float] = defaultdict(float)
        if self.objective.statistics:
            for micro in cut:
                batch = self.batch(micro, shuffle, mismatched=True)
                for name, value in self.objective.statistics(batch, self.options).items():
                    sums[name] += float(value.detach())
        loss, metrics = 0.0, defaultdict(lambda: [0.0, 0.0])
        for batch in batches:
            part = self.objective.loss(replace(batch, statistics=dict(sums)), total, self.options)
            part.value.backward()
            loss += float(part.value.detach())
            for name, (value, count) in part.metrics.items():
                assert not value.requires_grad
                metrics[name][0] += float(value)
                metrics[name][1] += float(count)
        leaf = self.logps if self.objective.needs == "tokens" else self.scores
        gradients, leaf.grad = leaf.grad, None
        return loss, gradients, {name: value / count for name, (value, count) in metrics.items() if count}


def make_world(name: str, values: dict[str, Any], seed: int, num_samples: int = 7) -> World:
    objective = find(ROOM, name, "OBJECTIVE")
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    width, number = (1 if objective.sample == "single" else 2), 0
    samples = []
    for _ in range(num_samples):
        samples.append([])
        for _ in range(width):
            length = dice.randint(1, 6)
            samples[-1].append(list(range(number, number + length)))
            number += length

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    num_labels = 1 if name == "reward" else NUM_LABELS
    count = number if objective.needs == "token_scores" else num_samples * width
    labels = torch.randint(0, num_labels, (count,), generator=generator)
    if values.get("labels") == "multi":
        labels = torch.rand(count, num_labels, generator=generator) < 0.5
    elif values.get("labels") == "numbers":
        labels = normal(count, num_labels)
    elif objective.needs == "token_scores":
        labels[::4] = -100
    elif name == "kto":
        labels = torch.tensor([dice.random() < 0.5 for _ in range(count)])
    weights = torch.tensor([dice.choice([1.0, 1.0, 0.5, 2.0]) for _ in range(number)], dtype=torch.float64)
    return World(
        objective,
        options_of(name, values),
        samples,
        logps=(-normal(number).abs() - 0.01).requires_grad_(),
        scores=normal(count, num_labels).requires_grad_(),
        reference=-normal(number).abs(),
        weights=weights,
        labels=labels,
    )


def random_cut(dice: random.Random, num_samples: int) -> list[list[int | None]]:
    """Samples in any order, in micro-batches of any size, with padding anywhere."""
    order = list(range(num_samples))
    dice.shuffle(order)
    cut: list[list[int | None]] = []
    while order:
        size = dice.randint(1, len(order))
        micro: list[int | None] = list(order[:size])
        order = order[size:]
        for _ in range(dice.randint(0, 2)):
            micro.insert(dice.randint(0, len(micro)), None)
        cut.append(micro)
    cut.insert(dice.randint(0, len(cut)), [None, None])  # a rank that has nothing but padding
    return cut


CASES = [(name, values) for name in VARIANTS for values in VARIANTS[name]]


def test_every_objective_is_tested_and_documented():
    assert sorted(VARIANTS) == list(names(ROOM))
    page = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text(encoding="utf-8")
    table = page[: page.index("```yaml")]
    rows = {row.split("`")[1]: row.split("|") for row in table.splitlines() if row.startswith("| `")}
    for name in names(ROOM):
        objective, section = find(ROOM, name, "OBJECTIVE"), options_of(name, {})
        assert objective.name == name and objective.summary
        options = set() if section is None else set(type(section).model_fields)
        assert options == {word.strip("`") for word in rows[name][5].replace(",", " ").split() if "`" in word}
        needs_one = "yes" if objective.needs_reference(section) else "no"
        assert rows[name][3].strip() == needs_one


@pytest.mark.parametrize(("name", "values"), CASES, ids=[f"{n}-{v}" for n, v in CASES])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_any_split_gives_the_same_loss_gradients_and_metrics(name, values, seed):
    world, dice = make_world(name, values, seed), random.Random(seed)
    loss, gradients, metrics = world.evaluate([list(range(len(world.samples)))])
    assert gradients.abs().max() > 1e-3  # something learns
    other = world.evaluate(random_cut(dice, len(world.samples)), dice)
    assert math.isclose(loss, other[0], rel_tol=1e-12, abs_tol=1e-12)
    torch.testing.assert_close(gradients, other[1], rtol=1e-11, atol=1e-13)
    assert metrics == pytest.approx(other[2], rel=1e-12, abs=1e-12)


OF_TOKENS = [case for case in CASES if find(ROOM, case[0], "OBJECTIVE").needs != "sequence_scores"]


@pytest.mark.parametrize(("name", "values"), OF_TOKENS, ids=[f"{n}-{v}" for n, v in OF_TOKENS])
def test_a_token_of_weight_two_is_two_tokens(name, values):
    """In sums over an answer and in means over it."""
    world = make_world(name, values, seed=7)
    count = len(world.weights)
    weights = torch.arange(count) % 3 + 1
    world.weights = weights.double()
    whole = [list(range(len(world.samples)))]
    loss, gradients, metrics = world.evaluate(whole)
    world.weights = torch.ones(count, dtype=torch.float64)
    world.samples = [
        [[token for token in sequence for _ in range(int(weights[token]))] for sequence in sample]
        for sample in world.samples
    ]
    other = world.evaluate(whole)
    assert math.isclose(loss, other[0], rel_tol=1e-12)
    torch.testing.assert_close(gradients, other[1], rtol=1e-11, atol=1e-13)
    if name != "token_classification":  # whose accuracy counts labelled tokens, whatever their weight
        assert metrics == pytest.approx(other[2], rel=1e-12, abs=1e-12)


WITH_REFERENCE = [case for case in CASES if case[0] in ("dpo", "kto") and not case[1].get("reference_free")]


@pytest.mark.parametrize(("name", "values"), WITH_REFERENCE, ids=[f"{n}-{v}" for n, v in WITH_REFERENCE])
def test_a_reference_computed_before_is_the_same(name, values):
    """Its weighted sums in the place of its log-probabilities."""
    world = make_world(name, values, seed=5)
    cut = random_cut(random.Random(5), len(world.samples))
    loss, gradients, metrics = world.evaluate(cut)
    live = world.batch

    def known(*arguments: Any, **more: Any) -> Batch:
        batch = live(*arguments, **more)
        sums = torch.zeros(len(batch.lengths), dtype=torch.float64)
        sums.index_add_(0, batch.segments, batch.weights * batch.reference_logps)
        return replace(batch, reference_logps=None, reference_sums=sums)

    world.batch = known
    other = world.evaluate(cut)
    assert math.isclose(loss, other[0], rel_tol=1e-12)
    torch.testing.assert_close(gradients, other[1], rtol=1e-11, atol=1e-13)
    assert metrics == pytest.approx(other[2], rel=1e-12, abs=1e-12)


DIFFERENTIABLE = [case for case in CASES if case[1] != {"loss_type": "dft"}]  # dft weighs by what has no gradient


@pytest.mark.parametrize(("name", "values"), DIFFERENTIABLE, ids=[f"{n}-{v}" for n, v in DIFFERENTIABLE])
def test_gradients_are_those_of_the_loss(name, values):
    """By finite differences: nothing that should have a gradient is detached."""
    world = make_world(name, values, seed=3)
    leaf = world.logps if world.objective.needs == "tokens" else world.scores
    whole = [list(range(len(world.samples)))]
    _, gradients, _ = world.evaluate(whole)
    if world.objective.statistics:  # KTO's z0 has no gradient: held where it is
        known = world.objective.statistics(world.batch(whole[0], mismatched=True), world.options)
        world.objective = replace(world.objective, statistics=lambda *_: known)
    step, losses = 1e-6, []
    direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0), dtype=leaf.dtype)
    for sign in (1, -1):
        moved = (leaf.detach() + sign * step * direction).requires_grad_()
        world.logps, world.scores = moved, moved
        losses.append(world.evaluate(whole)[0])
    numerical = (losses[0] - losses[1]) / (2 * step)
    assert numerical == pytest.approx(float((gradients * direction).sum()), rel=1e-6, abs=1e-8)


def pair(chosen: list[float], rejected: list[float], dtype: torch.dtype = torch.float64) -> Batch:
    """One pair with these log-probabilities."""
    values = torch.tensor([*chosen, *rejected], dtype=dtype, requires_grad=True)
    segments = torch.tensor([0] * len(chosen) + [1] * len(rejected))
    lengths = torch.tensor([len(chosen), len(rejected)])
    return Batch(torch.ones_like(values).detach(), segments, lengths, torch.ones(1, dtype=dtype), logps=values)


def test_conservative_dpo_mixes_both_orders_of_a_pair():
    def loss(chosen: list[float], rejected: list[float], smoothing: float) -> float:
        options = dpo.Options(reference_free=True, label_smoothing=smoothing)
        return float(dpo.loss(pair(chosen, rejected), torch.tensor(1.0), options).value.detach())

    a, b = [-1.0, -2.0], [-4.0]
    assert loss(a, b, 0.2) == pytest.approx(0.8 * loss(a, b, 0) + 0.2 * loss(b, a, 0))


@pytest.mark.parametrize(
    "values",
    [
        {"dpo": {"loss_type": "hinge", "label_smoothing": 0.1}},
        {"dpo": {"loss_type": "exo_pair"}},
        {"cpo": {"loss_type": "ipo", "label_smoothing": 0.1}},
    ],
)
def test_an_option_that_would_not_be_read_is_refused(values):
    with pytest.raises(ValidationError, match="label_smoothing"):
        JobConfig(objective=values)


@pytest.mark.parametrize("name", ["dpo", "orpo", "cpo", "simpo"])
def test_answers_without_tokens_and_certain_answers_stay_finite(name):
    """An answer that was cut off, and one of which the model is certain."""
    objective = find(ROOM, name, "OBJECTIVE")
    options = dpo.Options(reference_free=True) if name == "dpo" else options_of(name, {})
    for batch in (pair([], [-1.0], torch.float32), pair([0.0, 0.0], [-1e-9], torch.float32)):
        part = objective.loss(batch, torch.tensor(1.0), options)
        part.value.backward()
        assert part.value.isfinite()
        assert batch.logps.grad.isfinite().all()


def test_odds_are_exact_where_an_answer_is_almost_certain():
    batch = pair([-1e-5], [-3.0], torch.float32)
    part = find(ROOM, "orpo", "OBJECTIVE").loss(batch, torch.tensor(1.0), options_of("orpo", {}))

    def log_odds(logp: float) -> float:
        return logp - math.log(-math.expm1(logp))

    assert float(part.metrics["log_odds_chosen"][0]) == pytest.approx(log_odds(-1e-5) - log_odds(-3.0), rel=1e-6)


def kto_loss(answers: list[float], mismatched: list[float], labels: list[bool], **options: float) -> Any:
    """One token an answer; the reference says 0 everywhere, so log-probabilities are log-ratios."""
    objective, num = find(ROOM, "kto", "OBJECTIVE"), len(answers)
    batch = Batch(
        *(torch.ones(num), torch.arange(num), torch.ones(num, dtype=torch.int64), torch.ones(num)),
        labels=torch.tensor(labels),
        logps=torch.tensor(answers),
        reference_logps=torch.zeros(num),
    )
    section = options_of("kto", options)
    others = replace(batch, logps=torch.tensor(mismatched))
    known = {name: float(value) for name, value in objective.statistics(others, section).items()}
    return objective.loss(replace(batch, statistics=known), objective.count(batch), section)


def test_kto_by_hand():
    part = kto_loss([2.0, -1.0, 4.0], [0.5, 1.5, 1.0], [True, False, True], beta=0.5, undesirable_weight=2.0)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    z0 = 1.0  # of the three mismatched answers
    wanted = sum(1 - sigmoid(0.5 * (r - z0)) for r in (2, 4))
    expected = (wanted + 2 * (1 - sigmoid(0.5 * (z0 + 1)))) / 3
    assert float(part.value) == pytest.approx(expected, rel=1e-6)
    means = {name: float(value / count) for name, (value, count) in part.metrics.items()}
    assert means == pytest.approx(
        {
            "rewards/chosen": 1.5,
            "rewards/rejected": -0.5,
            "rewards/margins": 2.0,
            "logps/chosen": 3.0,
            "logps/rejected": -1.0,
            "kl": 1.0,
        }
    )


def test_a_missing_reference_is_not_taken_for_one_that_gives_everything_the_same_probability():
    with pytest.raises(AssertionError):
        dpo.loss(pair([-1.0], [-2.0]), torch.tensor(1.0), dpo.Options())


def test_kto_takes_no_negative_divergence_and_reports_no_mean_of_nothing():
    part = kto_loss([1.0, 1.0], [-3.0, 1.0], [True, True])
    assert float(part.metrics["kl"][0]) == 0.0
    assert float(part.metrics["rewards/rejected"][1]) == 0
    assert "rewards/margins" not in part.metrics


def test_a_reward_model_gives_one_score():
    batch = Batch(
        torch.ones(0), torch.zeros(0, dtype=torch.int64), torch.ones(2), torch.ones(1), scores=torch.ones(2, 3)
    )
    with pytest.raises(RunError, match="one score"):
        find(ROOM, "reward", "OBJECTIVE").loss(batch, torch.tensor(1.0), options_of("reward", {}))
