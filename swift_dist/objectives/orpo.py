r"""Odds ratio preference optimization, arXiv 2403.07691: fine-tuning on the chosen answer and preference in one loss,
without a reference model.

    L = 1/P * sum over pairs of -log P(y_w | x) - beta * log sigmoid(log odds(y_w | x) - log odds(y_l | x))
    log P(y | x) = log pi(y | x) / |y|  (per token),  odds(y | x) = P / (1 - P)

`beta` is the paper's lambda. `count` is P, the number of real pairs. The likelihood term is the paper's: of the chosen
answer, a mean over pairs of means over tokens. TRL's is a mean over a micro-batch's tokens, prompts among them; the
same where a micro-batch is one pair whose prompt is one token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from swift_dist.config.section import Section
from swift_dist.objectives._preference import chosen_nll, preference_metrics, real_pairs
from swift_dist.objectives._sequences import count_samples, mean_of
from swift_dist.objectives.base import Batch, Loss, Objective

if TYPE_CHECKING:
    import torch


class Options(Section):
    beta: float = Field(0.1, gt=0, description="weight of the odds ratio (the paper's lambda)")


def loss(batch: Batch, total: torch.Tensor, options: Options) -> Loss:
    from torch.nn.functional import logsigmoid

    chosen, rejected = real_pairs(batch)
    nll = chosen_nll(chosen)
    log_odds = _log_odds(chosen.mean_logps) - _log_odds(rejected.mean_logps)
    ratios = logsigmoid(log_odds)
    rewards = options.beta * chosen.mean_logps, options.beta * rejected.mean_logps
    metrics = {
        **preference_metrics(*rewards, chosen.mean_logps, rejected.mean_logps),
        "nll": mean_of(nll),
        "log_odds_ratio": mean_of(ratios),
        "log_odds_chosen": mean_of(log_odds),
    }
    return Loss((nll - options.beta * ratios).sum() / total, metrics)


def _log_odds(logps: torch.Tensor) -> torch.Tensor:
    """log(P / (1 - P)) of log P; log(1 - P) as in Maechler, "Accurately computing log(1 - exp(-|a|))" (2012).

    The odds of a probability that rounds to 1 are those of the largest one below it: finite, so that an answer which is
    certain stops learning instead of making the step's loss NaN.
    """
    import torch

    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    half = -0.6931471805599453
    # Both branches get values at which their gradients are finite; where() would pass NaN * 0 on otherwise.
    small, large = logps.clamp(max=half), logps.clamp(min=half)
    return logps - torch.where(logps < half, torch.log1p(-small.exp()), torch.log(-torch.expm1(large)))


OBJECTIVE = Objective(
    name="orpo",
    summary="fine-tuning and preference in one, by odds ratios, without a reference model; arXiv 2403.07691",
    needs="tokens",
    sample="pair",
    needs_reference=lambda options: False,
    count=count_samples,
    loss=loss,
)
