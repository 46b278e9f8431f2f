"""The other side of the golden tests: plain transformers and torch's AdamW in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import golden_cases as cases
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def make_model(config: dict[str, Any], seed: int = 7) -> PreTrainedModel:
    """A Hugging Face model whose every parameter is random."""
    torch.manual_seed(seed)
    stated = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **stated), dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)


def train(model: PreTrainedModel, steps: int = cases.STEPS, auxiliary: bool = False) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step: AdamW, clipping, decay on matrices only, loss over all counting tokens.

    `auxiliary` adds the model's own router loss, and the z-loss that its config states.
    """
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": cases.WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=cases.LR,
        betas=cases.BETAS,
        eps=cases.EPS,
    )
    numbers = []
    for step in range(steps):
        batch = cases.batch(step, model.config.vocab_size)
        optimizer.zero_grad()
        loss, objective = batch_loss(model, batch, auxiliary)
        objective.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cases.CLIP)
        optimizer.step()
        numbers.append((loss.item(), norm.item()))
    return numbers


def batch_loss(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], auxiliary: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean token loss, what is differentiated)."""
    logits = model(batch["tokens"]).logits.float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    mask = batch["loss_mask"].flatten()
    loss = (losses * mask).sum() / mask.sum()
    if not auxiliary:
        return loss, loss
    # One sample is one micro-batch: both router losses are means over the micro-batches.
    outputs = [model(tokens[None], output_router_logits=True) for tokens in batch["tokens"]]
    balance = torch.stack([output.aux_loss for output in outputs]).mean()
    sizes = [torch.logsumexp(logits, dim=-1).square().mean() for output in outputs for logits in output.router_logits]
    z_loss = torch.stack(sizes).mean()
    return loss, loss + model.config.router_aux_loss_coef * balance + z_coefficient(model) * z_loss


def z_coefficient(model: PreTrainedModel) -> float:
    """transformers reads no z-loss; it is ours to add where a config states one."""
    return getattr(model.config, "router_z_loss_coef", None) or 0.0
