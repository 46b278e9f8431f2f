"""Loss-spike and NaN decisions."""

from __future__ import annotations

import math

import pytest

from swift_dist.config import TrainSection
from swift_dist.runs.guard import ENOUGH, WINDOW, Continue, GuardHistory, GuardPolicy, Skip, Stop, decide

CALM = GuardHistory(tuple(2.0 + 0.01 * (i % 3) for i in range(ENOUGH)))


def judge(policy, history, loss, grad_norm=1.0, step=121):
    return decide(policy, history, step=step, global_batch_size=8, loss=loss, grad_norm=grad_norm)


def test_policy_reads_the_train_section():
    train = TrainSection(nan_policy="skip", spike_factor=3, spike_policy="skip", max_skipped=2)
    assert GuardPolicy.of(train) == GuardPolicy("skip", 3, "skip", 2)


@pytest.mark.parametrize("loss, grad_norm, what", [(math.nan, 1, "loss is nan"), (2, math.inf, "gradient norm is inf")])
def test_not_finite_stops_naming_step_and_batch(loss, grad_norm, what):
    decision = judge(GuardPolicy(), CALM, loss, grad_norm)
    assert isinstance(decision, Stop)
    assert decision.reason == f"step 121 (samples 960-967 of the data order): the {what}"
    assert "--train.nan_policy skip" in decision.remedy


def test_not_finite_skips_and_counts_until_the_limit():
    policy, history = GuardPolicy(nan_policy="skip", max_skipped=2), CALM
    for skipped in (1, 2):
        decision = judge(policy, history, math.nan)
        assert isinstance(decision, Skip)
        history = history.after(decision, math.nan)
        assert history.num_skipped == skipped and history.losses == CALM.losses
    decision = judge(policy, history, math.nan)
    assert isinstance(decision, Stop) and "train.max_skipped" in decision.reason


def test_a_spike_is_told_from_the_median_of_accepted_losses():
    policy = GuardPolicy(spike_factor=2.0, spike_policy="skip")
    assert judge(policy, CALM, 4.0) == Continue()
    decision = judge(policy, CALM, 4.1)
    assert isinstance(decision, Skip) and "loss 4.1 is 2.04 times the median 2.01" in decision.reason
    history = CALM.after(decision, 4.1)
    assert 4.1 not in history.losses  # a spike does not raise the bar for the next one
    assert isinstance(judge(GuardPolicy(spike_factor=2.0), CALM, 4.1), Stop)


def test_no_verdict_before_there_is_enough_history_or_without_a_factor():
    policy = GuardPolicy(spike_factor=2.0)
    short = GuardHistory(CALM.losses[: ENOUGH - 1])
    assert judge(policy, short, 100.0) == Continue()
    assert judge(policy, short.after(Continue(), 2.0), 100.0) != Continue()
    assert judge(GuardPolicy(), CALM, 100.0) == Continue()


def test_history_is_bounded_and_travels_in_a_checkpoint():
    history = GuardHistory()
    for i in range(WINDOW + 10):
        history = history.after(Continue(), float(i))
    assert history.losses == tuple(float(i) for i in range(10, WINDOW + 10))
    assert GuardHistory.from_dict(history.to_dict()) == history
