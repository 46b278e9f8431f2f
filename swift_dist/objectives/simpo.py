r"""Simple preference optimization, arXiv 2405.14734: log-probabilities per token, a target margin, no reference model.

    L = 1/P * sum over pairs of f(beta (log pi(y_w | x) / |y_w| - log pi(y_l | x) / |y_l|) - gamma)
        + cpo_alpha * -log pi(y_w | x) / |y_w|
    f(z) = -(1 - e) log sigmoid(z) - e log sigmoid(-z),  e = label_smoothing

`count` is P, the number of real pairs. With ``cpo_alpha`` above 0 this is CPO-SimPO; the likelihood term is a mean over
pairs of means over tokens (see cpo.py). TRL: ``CPOTrainer`` with ``loss_type: simpo`` and ``cpo_alpha: 0``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from swift_dist.config.section import Section
from swift_dist.objectives._preference import chosen_nll, pair_losses, preference_metrics, real_pairs
from swift_dist.objectives._sequences import count_samples, mean_of
from swift_dist.objectives.base import Batch, Loss, Objective

if TYPE_CHECKING:
    import torch


class Options(Section):
    beta: float = Field(2.0, gt=0, description="scale of the difference of log-probabilities per token")
    gamma: float = Field(1.0, ge=0, description="margin by which the scaled difference is to be above 0")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of pairs labelled the wrong way round")
    cpo_alpha: float = Field(0.0, ge=0, description="weight of the chosen answers' negative log-likelihood")


def loss(batch: Batch, total: torch.Tensor, options: Options) -> Loss:
    chosen, rejected = real_pairs(batch)
    logps = chosen.mean_logps, rejected.mean_logps
    margins = logps[0] - logps[1] - options.gamma / options.beta
    losses = pair_losses(margins, "sigmoid", options.beta, options.label_smoothing)
    metrics = preference_metrics(options.beta * logps[0], options.beta * logps[1], *logps)
    if options.cpo_alpha:
        nll = chosen_nll(chosen)
        losses = losses + options.cpo_alpha * nll
        metrics["nll"] = mean_of(nll)
    return Loss(losses.sum() / total, metrics)


OBJECTIVE = Objective(
    name="simpo",
    summary="simple preference optimization of pairs: length-normalised, without a reference model; arXiv 2405.14734",
    needs="tokens",
    sample="pair",
    needs_reference=lambda options: False,
    count=count_samples,
    loss=loss,
)
