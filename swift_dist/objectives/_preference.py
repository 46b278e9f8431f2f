"""What objectives of preference pairs share: the pairs' sums, the likelihood term, losses without a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from swift_dist.objectives._sequences import log_ratios, mean_of, real_samples, sequence_sums, weighted_sums

if TYPE_CHECKING:
    import torch

    from swift_dist.objectives.base import Batch

Metrics = dict[str, "tuple[torch.Tensor, torch.Tensor]"]
PairLoss = Literal["sigmoid", "hinge", "ipo"]


@dataclass(frozen=True)
class Answers:
    """The chosen, or the rejected, answers of the micro-batch's P real pairs.

    Args:
        logps: [P], log pi(y | x) = sum over the answer's tokens of weight * log-probability.
        logratios: [P], the same sum of what the model gives more than the reference model; = logps without one.
        tokens: [P], the sum of the weights: the answer's number of tokens, where they are 1.
    """

    logps: torch.Tensor
    logratios: torch.Tensor
    tokens: torch.Tensor

    @property
    def mean_logps(self) -> torch.Tensor:
        return self.logps / self._divisor

    @property
    def mean_logratios(self) -> torch.Tensor:
        return self.logratios / self._divisor

    @property
    def _divisor(self) -> torch.Tensor:
        # An answer without tokens (all cut off) has a mean of 0, not of 0 / 0.
        return self.tokens + (self.tokens == 0)


def real_pairs(batch: Batch) -> tuple[Answers, Answers]:
    """Chosen and rejected answers of the pairs that are no padding."""
    assert batch.logps is not None
    real = real_samples(batch)
    tokens = sequence_sums(batch.weights, batch.segments, len(batch.lengths))
    logps, logratios = weighted_sums(batch, batch.logps), log_ratios(batch)
    return (
        Answers(logps[0::2][real], logratios[0::2][real], tokens[0::2][real]),
        Answers(logps[1::2][real], logratios[1::2][real], tokens[1::2][real]),
    )


def chosen_nll(chosen: Answers) -> torch.Tensor:
    """[P], the chosen answers' negative log-likelihood per token: -log pi(y_w | x) / |y_w|."""
    return -chosen.mean_logps


def pair_losses(margins: torch.Tensor, loss_type: PairLoss, beta: float, label_smoothing: float) -> torch.Tensor:
    """Losses [P] of how much more likely the chosen answers are, `margins` [P].

    sigmoid  -(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m),  e = `label_smoothing`: how many labels are wrong
    hinge    max(0, 1 - beta m)
    ipo      (m - 1 / (2 beta))^2
    """
    from torch.nn.functional import logsigmoid

    if loss_type == "hinge":
        return (1 - beta * margins).relu()
    if loss_type == "ipo":
        return (margins - 1 / (2 * beta)) ** 2
    straight = -logsigmoid(beta * margins)
    if not label_smoothing:
        return straight
    return (1 - label_smoothing) * straight - label_smoothing * logsigmoid(-beta * margins)


def preference_metrics(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
) -> Metrics:
    """Means over pairs, by the names that TRL gives them. All arguments are [P]."""
    return {
        "rewards/chosen": mean_of(chosen_rewards),
        "rewards/rejected": mean_of(rejected_rewards),
        "rewards/margins": mean_of(chosen_rewards - rejected_rewards),
        "rewards/accuracies": mean_of((chosen_rewards > rejected_rewards).to(chosen_rewards.dtype)),
        "logps/chosen": mean_of(chosen_logps),
        "logps/rejected": mean_of(rejected_logps),
    }
