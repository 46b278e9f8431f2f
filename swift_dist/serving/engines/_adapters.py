"""What vLLM and LMDeploy can apply of a PEFT adapter: plain LoRA. Whatever else is refused by name, because both read
the few fields that they know and would compute something else without a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swift_dist.errors import JobError

# fields of adapter_config.json that say nothing about the forward pass, or that both engines read
_PLAIN = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "lora_alpha", "use_rslora", "lora_dropout", "bias", "rank_pattern", "alpha_pattern"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
        *("megatron_config", "megatron_core", "runtime_config", "qalora_group_size", "init_lora_weights"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of the initialisation
    }
)
_NAMES = {"use_dora": "DoRA", "modules_to_save": "modules saved whole (modules_to_save)", "lora_bias": "trained biases"}
# Others (PiSSA, CorDA, OLoRA, LoftQ, LoRA-GA) change the model's own weights, which an engine reads as they were.
_INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva")


def check_lora(engine: str, name: str, path: str, largest_rank: int | None) -> None:
    """Refuse an adapter folder that is not plain LoRA with one rank and one scale.

    Args:
        engine: its name, for messages.
        name: the adapter's.
        path: its folder.
        largest_rank: that the engine was started with; None for any.

    Raises:
        JobError: what it is that the engine has no counterpart of.
    """
    config = read_adapter(name, path)

    def refuse(what: str, remedy: str) -> JobError:
        return JobError("adapters", f"{name}: {engine} cannot apply {what}", remedy)

    merge = "Merge it into the model (swift-dist merge), or use --infer_backend hf."
    kind = config.get("peft_type")
    if kind != "LORA":
        raise refuse(f"an adapter of type {kind}", merge)
    for key in ("r", "lora_alpha"):  # which PEFT has defaults of, and the engines have not
        if not isinstance(config.get(key), int | float):
            raise refuse(f"LoRA whose {key} is not said in adapter_config.json", merge)
    for feature in sorted(key for key, value in config.items() if value and key not in _PLAIN):
        raise refuse(_NAMES.get(feature, f"LoRA with {feature}"), merge)
    if config.get("init_lora_weights") not in _INITIALISATIONS:
        what = f"LoRA whose initialisation ({config['init_lora_weights']}) changed the model's own weights"
        raise refuse(what, merge)
    if config.get("bias", "none") != "none":
        raise refuse(f"trained biases (bias: {config['bias']})", merge)
    _check_patterns(config, refuse, merge)
    rank = int(config["r"])
    if largest_rank is not None and rank > largest_rank:
        raise refuse(f"rank {rank}, larger than --max_lora_rank {largest_rank}", f"Add --max_lora_rank {rank}.")


def _check_patterns(config: dict[str, Any], refuse: Callable[[str, str], JobError], remedy: str) -> None:
    """Ranks and alphas by module: the engines scale every module by alpha / r, so another ratio would be wrong."""
    for field, common in (("rank_pattern", config["r"]), ("alpha_pattern", config["lora_alpha"])):
        others = {value for value in (config.get(field) or {}).values() if value != common}
        if others:
            raise refuse(f"modules of different {field.split('_')[0]}s ({field})", remedy)


def read_adapter(name: str, path: str) -> dict[str, Any]:
    """The folder's adapter_config.json.

    Raises:
        JobError: there is none, or it cannot be read.
    """
    file = Path(path) / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise JobError("adapters", f"{name}: {file}: {error.strerror}", "Give a folder of a PEFT adapter.") from error
    except ValueError as error:
        raise JobError(
            "adapters", f"{name}: {file} is not JSON: {error}", "Give a folder of a PEFT adapter."
        ) from error
    if not isinstance(config, dict) or not {"peft_type"} <= config.keys():
        raise JobError("adapters", f"{name}: {file} is no adapter's", "Give a folder of a PEFT adapter.")
    return config
