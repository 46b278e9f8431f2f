r"""Kahneman-Tversky optimization, arXiv 2402.01306: single answers that are wanted or not, near a reference model.

    L = 1/N * sum of  w_d (1 - sigmoid(beta (r - z0)))  over wanted and  w_u (1 - sigmoid(beta (z0 - r)))  over unwanted
    r = log pi(y | x) / ref(y | x),  z0 = max(0, mean over samples of log pi(y' | x) / ref(y' | x)),  without gradient

where y' is another sample's answer, put behind this sample's prompt: z0 estimates the divergence KL(pi || ref).

`loss` is of the answers, which `labels` judges, `statistics` of the mismatched ones, in a forward pass of their own
without gradient. `count` is N, the number of answers. `statistics` adds log-ratios up, so z0 is one number over the
global batch. TRL takes the mean over each rank's micro-batch and then over ranks: the same number where the global
batch is one micro-batch on each rank; with gradient accumulation another, noisier one for each micro-batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from swift_dist.config.section import Section
from swift_dist.objectives._sequences import count_samples, log_ratios, mean_of, real_samples, weighted_sums
from swift_dist.objectives.base import Batch, Loss, Objective

if TYPE_CHECKING:
    import torch


class Options(Section):
    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference model")
    desirable_weight: float = Field(1.0, ge=0, description="weight of wanted answers' losses")
    undesirable_weight: float = Field(1.0, ge=0, description="weight of unwanted answers' losses")


def statistics(batch: Batch, options: Options) -> dict[str, torch.Tensor]:
    """Sums over mismatched answers: their log-ratios; and how many of the answers are wanted and unwanted."""
    real = real_samples(batch)
    mismatched = _logratios(batch)[real]
    wanted = _wanted(batch)[real].to(mismatched.dtype)
    return {
        "mismatched_logratios": mismatched.sum(),
        "desirable": wanted.sum(),
        "undesirable": (1 - wanted).sum(),
    }


def loss(batch: Batch, total: torch.Tensor, options: Options) -> Loss:
    assert batch.logps is not None
    real = real_samples(batch)
    logratios = _logratios(batch)[real]
    logps = weighted_sums(batch, batch.logps)[real]
    wanted = _wanted(batch)[real]
    known = batch.statistics
    divergence = max(0.0, known["mismatched_logratios"] / max(known["desirable"] + known["undesirable"], 1))
    gains = options.beta * (logratios - divergence)
    losses = options.desirable_weight * wanted * (1 - gains.sigmoid())
    losses = losses + options.undesirable_weight * ~wanted * (1 - (-gains).sigmoid())
    rewards = options.beta * logratios
    metrics = {
        "rewards/chosen": _mean_where(wanted, rewards),
        "rewards/rejected": _mean_where(~wanted, rewards),
        "logps/chosen": _mean_where(wanted, logps),
        "logps/rejected": _mean_where(~wanted, logps),
        "kl": mean_of(logratios.new_full((len(real),), divergence)),
    }
    if known["desirable"] and known["undesirable"]:
        # A difference of means over different samples: its parts are divided already, and their counts add up to 1.
        chosen = metrics["rewards/chosen"][0] / known["desirable"]
        rejected = metrics["rewards/rejected"][0] / known["undesirable"]
        metrics["rewards/margins"] = chosen - rejected, count_samples(batch) / total
    return Loss(losses.sum() / total, metrics)


def _mean_where(mask: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A metric: (sum, count) of `values` where `mask`."""
    return (values.detach() * mask).sum(), mask.sum().to(values.dtype)


def _logratios(batch: Batch) -> torch.Tensor:
    """[num_sequences]"""
    assert batch.reference_logps is not None or batch.reference_sums is not None
    return log_ratios(batch)


def _wanted(batch: Batch) -> torch.Tensor:
    """bool [num_samples]; a mismatched answer has the label of the answer that it stands beside."""
    assert batch.labels is not None
    return batch.labels > 0


OBJECTIVE = Objective(
    name="kto",
    summary="single answers that are wanted or not, beside a reference model; arXiv 2402.01306",
    needs="tokens",
    sample="kto",
    needs_reference=lambda options: True,
    count=count_samples,
    loss=loss,
    statistics=statistics,
)
