"""Tiny random models on disk, a few training steps in plain torch, and what a tuner makes of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)

from swift_dist.config import JobConfig
from swift_dist.tuners._stack import TunerStack, find_tuners

VOCAB = 64
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # the default would give logits so near 0 that no difference shows
    "pad_token_id": 0,
}


def tiny_folder(folder: Path, kind: str = "llama", **sizes: int) -> Path:
    """A folder of random weights: llama, qwen2 (tied embeddings, biases), mixtral (experts in one tensor) or classifier
    (llama with a head)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _random_model(kind, SIZES | sizes).save_pretrained(folder)
    return folder


def _random_model(kind: str, sizes: dict[str, Any]) -> Any:
    if kind == "classifier":
        return AutoModelForSequenceClassification.from_config(LlamaConfig(**sizes, num_labels=3))
    if kind == "mixtral":
        return AutoModelForCausalLM.from_config(MixtralConfig(**sizes, num_local_experts=4))
    if kind == "llama":
        return AutoModelForCausalLM.from_config(LlamaConfig(**sizes))
    model = AutoModelForCausalLM.from_config(Qwen2Config(**sizes, tie_word_embeddings=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def load(folder: Path, kind: str = "llama", **arguments: Any) -> Any:
    classes = {"classifier": AutoModelForSequenceClassification}
    return classes.get(kind, AutoModelForCausalLM).from_pretrained(folder, **arguments)


def batch(rows: int = 2, width: int = 8) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, width), generator=torch.Generator().manual_seed(7))


def logits(model: Any) -> torch.Tensor:
    """Of `batch()`, in evaluation."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        out = model(input_ids=batch()).logits
    model.train(was_training)
    return out


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest one, in units of the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def stack_of(name: str | list[str], **section: Any) -> TunerStack:
    """As a job's ``tuner`` section names them: ``stack_of("lora", lora={"rank": 4})``."""
    return find_tuners(JobConfig.model_validate({"tuner": {"name": name, **section}}).tuner)


def reloaded(base: Path, kind: str, stack: TunerStack, folder: Path) -> Any:
    """What transformers, or PEFT on a fresh base, make of an export."""
    if stack.saves == "model":
        return load(folder, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of a rank pattern in its own naming
        return PeftModel.from_pretrained(load(base, kind), folder)


def learning(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def groups_of(model: Any, stack: TunerStack, lr: float) -> list[dict[str, Any]]:
    """One group for each multiple of the learning rate."""
    groups: dict[float, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = stack.learning_rate_scale(name)
            group = groups.setdefault(scale, {"params": [], "names": [], "lr": lr * scale, "lr_scale": scale})
            group["params"].append(parameter)
            group["names"].append(name)
    return list(groups.values())


def train(model: Any, stack: TunerStack, steps: int = 2, lr: float = 0.01, begin: int = 0) -> torch.optim.Optimizer:
    """Steps as the engine takes them, in one process."""

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=lr, weight_decay=0.01)

    model.train()
    optimizer = stack.optimizer(groups_of(model, stack, lr), make)
    for step in range(begin, steps):
        stack.before_step(model, step, steps)
        out = model(input_ids=batch()).logits
        out.float().log_softmax(-1)[..., 1].mean().neg().backward()
        stack.before_update(model, step, steps)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def export(model: Any, stack: TunerStack, folder: Path) -> Path:
    """As the engine exports: from whole weights by name, of those that the tuner asks for."""
    held = model.state_dict()
    weights = {name: held[name].clone() for name in stack.exported(model)}
    stack.export(model, weights, folder, "5GB")
    return folder
