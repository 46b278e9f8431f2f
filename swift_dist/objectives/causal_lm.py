r"""Next-token prediction: the weighted mean of the tokens' losses.

    L = 1/W * sum_t w_t l_t,  W = sum_t w_t    over the tokens of the global batch

    nll   l_t = -log p(y_t | y_<t)
    dft   l_t = -sg(p(y_t | y_<t)) * log p(y_t | y_<t)    dynamic fine-tuning, arXiv 2508.05629; sg: no gradient

`count` is W, the sum of the loss weights: of weights that are 0 or 1 the number of tokens that learn, as in TRL's and
transformers' ``num_items_in_batch``. With other weights (`template.loss_scale`) the mean stays a mean: doubling every
weight changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from swift_dist.config.section import Section
from swift_dist.objectives.base import Batch, Loss, Objective

if TYPE_CHECKING:
    import torch


class Options(Section):
    loss_type: Literal["nll", "dft"] = Field(
        "nll", description="negative log-likelihood, or dynamic fine-tuning, which weights it by the probability"
    )


def count(batch: Batch) -> torch.Tensor:
    return batch.weights.sum()


def loss(batch: Batch, total: torch.Tensor, options: Options) -> Loss:
    assert batch.logps is not None
    nll = -batch.weights * batch.logps
    if options.loss_type == "nll":
        return Loss(nll.sum() / total)
    value = (nll * batch.logps.detach().exp()).sum() / total
    return Loss(value, {"nll": (nll.detach().sum(), count(batch))})


OBJECTIVE = Objective(
    name="causal_lm",
    summary="next-token prediction (supervised fine-tuning); loss_type dft: arXiv 2508.05629",
    needs="tokens",
    sample="single",
    needs_reference=lambda options: False,
    count=count,
    loss=loss,
)
