r"""Direct preference optimization, arXiv 2305.18290: the chosen answer above the rejected one, near a reference model.

    L = 1/P * sum over pairs of f(m) + rpo_alpha * -log pi(y_w | x) / |y_w|
    r_w = log pi(y_w | x) / ref(y_w | x),  r_l = log pi(y_l | x) / ref(y_l | x),  m = r_w - r_l

    sigmoid       -log sigmoid(beta m); with label_smoothing e, a share of wrong labels, conservative DPO:
                  -(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m)
    robust        (-(1 - e) log sigmoid(beta m) + e log sigmoid(-beta m)) / (1 - 2 e)              arXiv 2403.00409
    hinge         max(0, 1 - beta m)                                                              arXiv 2305.10425
    ipo           (r_w / |y_w| - r_l / |y_l| - 1 / (2 beta))^2; by length, as its authors ran it     arXiv 2310.12036
    sigmoid_norm  -log sigmoid(beta (r_w / |y_w| - r_l / |y_l|))                                   arXiv 2411.15124
    exo_pair      KL(softmax(beta r_w, beta r_l) || (1 - e, e))                                    arXiv 2402.00856
    nca_pair      -log sigmoid(beta r_w) - 1/2 log sigmoid(-beta r_w) - 1/2 log sigmoid(-beta r_l) arXiv 2402.05369
    bco_pair      -log sigmoid(beta r_w) - log sigmoid(-beta r_l); no running mean of rewards      arXiv 2404.04656
    sppo_hard     (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2                                  arXiv 2405.00675
    apo_zero      1 - sigmoid(beta r_w) + sigmoid(beta r_l)                                        arXiv 2408.06266
    apo_down      sigmoid(beta r_w) + 1 - sigmoid(beta m)                                          arXiv 2408.06266

`count` is P, the number of real pairs. Names and formulas are those of TRL 1.16, with two differences. The likelihood
term (RPO, arXiv 2404.19733) is a mean over pairs of means over tokens, as in the paper: TRL's ``loss_type: sft`` is
a mean over a micro-batch's tokens, which depends on how pairs are put together, and is ours where a micro-batch is one
pair. And TRL leaves label_smoothing out of ``sigmoid``. log pi(y | x) is the sum of weight * log-probability over the
answer's tokens and |y| the sum of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from swift_dist.config.section import Section
from swift_dist.objectives._preference import Answers, PairLoss, chosen_nll, pair_losses, preference_metrics, real_pairs
from swift_dist.objectives._sequences import count_samples, mean_of
from swift_dist.objectives.base import Batch, Loss, Objective

if TYPE_CHECKING:
    import torch

LossType = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "sigmoid_norm",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
]
SMOOTHED = ("sigmoid", "robust", "exo_pair")


class Options(Section):
    loss_type: LossType = Field("sigmoid", description="shape of the loss, by TRL's names")
    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference model (ipo: tau)")
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="share of pairs that are labelled the wrong way round (sigmoid, robust, exo_pair)",
    )
    rpo_alpha: float = Field(0.0, ge=0, description="weight of the chosen answers' negative log-likelihood")
    reference_free: bool = Field(False, description="a reference model that gives every answer the same probability")

    @model_validator(mode="after")
    def _smoothing_is_read(self) -> Options:
        if self.label_smoothing and self.loss_type not in SMOOTHED:
            raise ValueError(f"label_smoothing is for loss_type {', '.join(SMOOTHED)}, not {self.loss_type}")
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError("loss_type exo_pair needs a label_smoothing above 0; its authors take 0.001")
        return self


def loss(batch: Batch, total: torch.Tensor, options: Options) -> Loss:
    has_reference = batch.reference_logps is not None or batch.reference_sums is not None
    assert has_reference != options.reference_free
    chosen, rejected = real_pairs(batch)
    losses = dpo_losses(chosen, rejected, options)
    rewards = options.beta * chosen.logratios.detach(), options.beta * rejected.logratios.detach()
    metrics = preference_metrics(*rewards, chosen.logps, rejected.logps)
    if options.rpo_alpha:
        nll = chosen_nll(chosen)
        losses = losses + options.rpo_alpha * nll
        metrics["nll"] = mean_of(nll)
    return Loss(losses.sum() / total, metrics)


def dpo_losses(chosen: Answers, rejected: Answers, options: Options) -> torch.Tensor:
    """Losses [P] of pairs."""
    if options.loss_type in _OF_REWARDS:
        return _OF_REWARDS[options.loss_type](
            options.beta * chosen.logratios, options.beta * rejected.logratios, options.label_smoothing
        )
    if options.loss_type == "sppo_hard":
        half = 0.5 / options.beta
        return (chosen.logratios - half) ** 2 + (rejected.logratios + half) ** 2
    if options.loss_type in ("ipo", "sigmoid_norm"):
        margins = chosen.mean_logratios - rejected.mean_logratios
    else:
        margins = chosen.logratios - rejected.logratios
    shape: PairLoss = options.loss_type if options.loss_type in ("hinge", "ipo") else "sigmoid"
    return pair_losses(margins, shape, options.beta, options.label_smoothing)


def _robust(chosen: torch.Tensor, rejected: torch.Tensor, smoothing: float) -> torch.Tensor:
    straight, swapped = _nls(chosen - rejected), _nls(rejected - chosen)
    return ((1 - smoothing) * straight - smoothing * swapped) / (1 - 2 * smoothing)


def _exo_pair(chosen: torch.Tensor, rejected: torch.Tensor, smoothing: float) -> torch.Tensor:
    margins = chosen - rejected
    straight = margins.sigmoid() * (-_nls(margins) - math.log1p(-smoothing))
    return straight + (-margins).sigmoid() * (-_nls(-margins) - math.log(smoothing))


def _nls(values: torch.Tensor) -> torch.Tensor:
    """-log sigmoid."""
    from torch.nn.functional import logsigmoid

    return -logsigmoid(values)


_OF_REWARDS: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": lambda chosen, rejected, _: _nls(chosen) + 0.5 * _nls(-chosen) + 0.5 * _nls(-rejected),
    "bco_pair": lambda chosen, rejected, _: _nls(chosen) + _nls(-rejected),
    "apo_zero": lambda chosen, rejected, _: 1 - chosen.sigmoid() + rejected.sigmoid(),
    "apo_down": lambda chosen, rejected, _: chosen.sigmoid() + 1 - (chosen - rejected).sigmoid(),
}
"""(beta r_w [P], beta r_l [P], label smoothing) -> losses [P]."""

OBJECTIVE = Objective(
    name="dpo",
    summary="direct preference optimization of pairs beside a reference model, and its variants; arXiv 2305.18290",
    needs="tokens",
    sample="pair",
    needs_reference=lambda options: not options.reference_free,
    count=count_samples,
    loss=loss,
)
