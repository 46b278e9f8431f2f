r"""A reward model of preference pairs (Bradley and Terry 1952; Ouyang et al., arXiv 2203.02155).

    L = 1/P * sum over pairs of -log sigmoid(s_w - s_l) + center_rewards_coefficient * (s_w + s_l)^2

s_w and s_l are the model's scores of the chosen and of the rejected conversation. The second term keeps scores around 0
(arXiv 2312.09244). `count` is P, the number of real pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from swift_dist.config.section import Section
from swift_dist.errors import RunError
from swift_dist.objectives._sequences import count_samples, in_float32, mean_of, real_samples
from swift_dist.objectives.base import Batch, Loss, Objective

if TYPE_CHECKING:
    import torch


class Options(Section):
    center_rewards_coefficient: float = Field(0.0, ge=0, description="weight of the square of the pairs' summed scores")


def loss(batch: Batch, total: torch.Tensor, options: Options) -> Loss:
    from torch.nn.functional import logsigmoid

    assert batch.scores is not None
    if batch.scores.shape[1] != 1:
        raise RunError(f"a reward model gives one score, this one {batch.scores.shape[1]}", "set model.num_labels: 1")
    scores, real = in_float32(batch.scores.squeeze(1)), real_samples(batch)
    chosen, rejected = scores[0::2][real], scores[1::2][real]
    losses = -logsigmoid(chosen - rejected)
    if options.center_rewards_coefficient:
        losses = losses + options.center_rewards_coefficient * (chosen + rejected) ** 2
    metrics = {
        "rewards/chosen": mean_of(chosen),
        "rewards/rejected": mean_of(rejected),
        "rewards/margins": mean_of(chosen - rejected),
        "rewards/accuracies": mean_of((chosen > rejected).to(scores.dtype)),
    }
    return Loss(losses.sum() / total, metrics)


OBJECTIVE = Objective(
    name="reward",
    summary="a score for conversations, learnt from preference pairs (Bradley-Terry); arXiv 2203.02155",
    needs="sequence_scores",
    sample="pair",
    needs_reference=lambda options: False,
    count=count_samples,
    loss=loss,
)
