r"""Contrastive preference optimization, arXiv 2401.08417: DPO under a uniform reference, and the chosen answer's
likelihood in place of the pull to a reference model.

    L = 1/P * sum over pairs of f(log pi(y_w | x) - log pi(y_l | x)) + cpo_alpha * -log pi(y_w | x) / |y_w|

    sigmoid  f(m) = -(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m),  e = label_smoothing
    hinge    f(m) = max(0, 1 - beta m)                                        arXiv 2305.10425
    ipo      f(m) = (m - 1 / (2 beta))^2 with log pi per token, log pi / |y|  arXiv 2310.12036

`count` is P, the number of real pairs. The likelihood term is a mean over pairs of means over tokens; TRL's is a mean
over a micro-batch's tokens, which depends on how pairs are put together: the same where a micro-batch is one pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from swift_dist.config.section import Section
from swift_dist.objectives._preference import PairLoss, chosen_nll, pair_losses, preference_metrics, real_pairs
from swift_dist.objectives._sequences import count_samples, mean_of
from swift_dist.objectives.base import Batch, Loss, Objective

if TYPE_CHECKING:
    import torch


class Options(Section):
    loss_type: PairLoss = Field("sigmoid", description="shape of the loss, by TRL's names")
    beta: float = Field(0.1, gt=0, description="scale of the log-probabilities' difference (ipo: tau)")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of pairs labelled the wrong way round (sigmoid)"
    )
    cpo_alpha: float = Field(1.0, ge=0, description="weight of the chosen answers' negative log-likelihood")

    @model_validator(mode="after")
    def _smoothing_is_read(self) -> Options:
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing is for loss_type sigmoid, not {self.loss_type}")
        return self


def loss(batch: Batch, total: torch.Tensor, options: Options) -> Loss:
    chosen, rejected = real_pairs(batch)
    logps = chosen.logps, rejected.logps
    if options.loss_type == "ipo":
        logps = chosen.mean_logps, rejected.mean_logps
    nll = chosen_nll(chosen)
    losses = pair_losses(logps[0] - logps[1], options.loss_type, options.beta, options.label_smoothing)
    metrics = preference_metrics(options.beta * logps[0], options.beta * logps[1], *logps)
    value = (losses + options.cpo_alpha * nll).sum() / total
    return Loss(value, {**metrics, "nll": mean_of(nll)})


OBJECTIVE = Objective(
    name="cpo",
    summary="contrastive preference optimization of pairs, without a reference model; arXiv 2401.08417",
    needs="tokens",
    sample="pair",
    needs_reference=lambda options: False,
    count=count_samples,
    loss=loss,
)
