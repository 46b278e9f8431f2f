"""What the tuners that PEFT implements share: wrapping, which entries are saved, and PEFT's folder."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_dist.errors import JobError
from swift_dist.tuners._export import written_whole
from swift_dist.tuners._patterns import matching
from swift_dist.tuners.base import Tuner

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

ADAPTER = "default"  # PEFT's name of a model's only adapter; it is no part of what is saved
WEIGHTS = "adapter_model.safetensors"

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForConditionalGeneration": "CAUSAL_LM",
}


class AdapterTuner(Tuner):
    """An adapter of PEFT's. Subclasses say which: `peft_config`."""

    saves = "adapter"

    def peft_config(self, model: torch.nn.Module, options: Any, modules_to_save: list[str] | None) -> PeftConfig:
        """PEFT's configuration of this adapter on `model`; `modules_to_save` learn beside it and are saved whole."""
        raise NotImplementedError

    def apply(
        self, model: torch.nn.Module, options: Any, *, seed: int, trainable: Sequence[str] = ()
    ) -> torch.nn.Module:
        """Wrap the model in a PeftModel; only the adapter and what `trainable` names learn.

        Whole modules are copied for `trainable`, so that the model without its adapter stays what it was; they get no
        adapter beside.

        Raises:
            JobError: patterns or target modules do not fit the model.
        """
        from peft import get_peft_model

        require_found(model, options, f"tuner.{self.name}")
        modules = modules_to_save(model, trainable)
        config = self.peft_config(model, options, list(modules) if modules else None)  # PEFT adds a head's to the list
        if modules and ties_saved(model, modules):
            if not hasattr(config, "ensure_weight_tying"):
                raise JobError(
                    "tuner.trainable",
                    f"{self.name} cannot train an embedding that is the output layer's weight, too",
                    "leave it out, or use lora",
                )
            config.ensure_weight_tying = True
        with seeded(seed), _as_job_error(f"tuner.{self.name}"):
            return get_peft_model(model, config)

    def without(self, model: Any) -> AbstractContextManager[Any] | None:
        config = model.peft_config[ADAPTER]
        if getattr(config, "bias", "none") != "none":
            return None  # the base's own biases have learnt, too
        return model.disable_adapter()

    def exported(self, model: torch.nn.Module) -> list[str]:
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return [
            name
            for name in model.state_dict()
            if name in learning or f".{ADAPTER}." in name or name.endswith(f".{ADAPTER}")
        ]

    def export(
        self, model: Any, weights: dict[str, torch.Tensor], options: Any, folder: Path, max_shard_size: str
    ) -> None:
        """Write adapter_config.json and adapter_model.safetensors, as PEFT does. `max_shard_size` does not matter: PEFT
        reads one file."""
        config = copy.deepcopy(model.peft_config[ADAPTER])
        config, weights = self.converted(model, config, dict(weights), options)
        write_adapter(model, config, weights, folder)

    def converted(
        self, model: torch.nn.Module, config: Any, weights: dict[str, torch.Tensor], options: Any
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """Config and weights as they are to be saved, where training needs others."""
        return config, weights


def write_adapter(model: Any, config: Any, weights: dict[str, torch.Tensor], folder: Path, name: str = ADAPTER) -> None:
    """Write one adapter of a model in PEFT's format, under the names that PEFT gives its weights."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    before, model.peft_config[name] = model.peft_config[name], config  # what PEFT writes depends on the config
    try:
        entries = get_peft_model_state_dict(model, state_dict=weights, adapter_name=name, save_embedding_layers=False)
    finally:
        model.peft_config[name] = before
    config.inference_mode = True
    with written_whole(folder) as new:
        # clones: safetensors refuses tensors that share memory
        save_file(
            {key: value.detach().clone().contiguous() for key, value in entries.items()},
            new / WEIGHTS,
            {"format": "pt"},
        )
        config.save_pretrained(new)


def require_found(model: torch.nn.Module, options: Any, key: str) -> None:
    """Refuse a name or pattern in `options` that is no module's. PEFT passes it by where another one is found, and what
    was to learn, or not to, is other than the job says.

    Raises:
        JobError: names it.
    """
    names = [name for name, _ in model.named_modules()]
    for option in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        given = getattr(options, option, ())
        if tuple(given) == ("all-linear",):
            continue
        for wanted in given:
            pattern = wanted if option.endswith("pattern") else re.escape(wanted)
            try:
                as_peft_reads_it = re.compile(rf"(.*\.)?({pattern})$")
            except re.error as error:
                raise JobError(
                    f"{key}.{option}", f"{wanted!r} is no regular expression: {error}", "correct it"
                ) from None
            if not any(as_peft_reads_it.match(name) for name in names):
                last = list(dict.fromkeys(name.rpartition(".")[2] for name in names if name))
                one_of = ", ".join(word for word in last if not word.isdecimal())
                said = f"no module of the {type(model).__name__} is called {wanted!r}"
                raise JobError(f"{key}.{option}", said, f"one of: {one_of}")


def task_type(model: torch.nn.Module) -> str | None:
    """PEFT's name of what a transformers class does, by the end of its name."""
    return next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), None)


def modules_to_save(model: torch.nn.Module, patterns: Sequence[str]) -> list[str] | None:
    """Full names of the modules that hold the weights which `patterns` match, for PEFT; None: no patterns."""
    if not patterns:
        return None
    names = matching((name for name, _ in model.named_parameters(remove_duplicate=False)), patterns, "tuner.trainable")
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def ties_saved(model: Any, modules: Sequence[str]) -> bool:
    """Whether one of `modules` shares its weight with another: its twin has to follow what it learns."""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    names = {name.rpartition(".")[0] for pair in tied.items() for name in pair}
    return any(module in names for module in modules)


def adapted_ties(model: torch.nn.Module) -> list[str]:
    """Names of weights that lie beneath an adapter and are another module's, too: merging would change both."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shared = [name for group in names.values() if len(group) > 1 for name in group]
    return [name for name in shared if "base_layer" in name.split(".")]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random values of the block come from `seed`; the generators outside go on as if it had not been."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _as_job_error(key: str) -> Iterator[None]:
    """PEFT's ValueError about a configuration that does not fit the model, as one about the job."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, JobError):
            raise
        raise JobError(
            key, str(error), "see the model's module names, for example in model.safetensors.index.json"
        ) from None


def never_adapted(model: torch.nn.Module) -> tuple[str, ...]:
    """Last words of the names of modules that no product can be put beside: Mamba's kernels read the weights themselves
    (PEFT 0.21 refuses them by these names, for these models)."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return ("out_proj", "conv1d") if kind in ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h") else ()
