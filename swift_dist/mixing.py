"""Several adapters on one model in Python, as in the SWIFT paper (arXiv 2408.05517): active together, in turns, merged.

import swift_dist
from swift_dist.tuners import ia3, lora

model = swift_dist.prepare_model(model, {"style": lora.Options(rank=8), "facts": lora.Options(), "gate": ia3.Options()})
model.activate("style", "gate")          # what computes and learns from here on
model.save_pretrained("adapters")        # adapters/style, adapters/facts, adapters/gate: folders that PEFT reads
model = swift_dist.from_pretrained(base, "adapters")
merged = model.merge()                   # of the active ones; a transformers model again
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from swift_dist.config.section import Section
from swift_dist.errors import JobError, RunError
from swift_dist.tuners._export import written_whole
from swift_dist.tuners._peft import WEIGHTS, adapted_ties, require_found, seeded
from swift_dist.tuners.lora import Options as LoraOptions
from swift_dist.tuners.lora import changes_base

_KINDS = ("LORA", "IA3")  # in this order around a layer: (IA)^3 scales what LoRA gives
_PREFIXES = ("lora_", "ia3_")  # of PEFT's modules and weights; the adapter's name follows
_CONFIG = "adapter_config.json"


def prepare_model(model: Any, adapters: Mapping[str, Section], *, seed: int = 0) -> MixedModel:
    """Add new adapters to a transformers model, which is changed in place; all are active.

    Args:
        adapters: name -> options of the tuner (``lora.Options``, ``qlora.Options``, ``ia3.Options``).
        seed: of the adapters' first weights.

    Raises:
        JobError: an option is of no adapter that can be mixed, or does not fit the model.
    """
    configs = {name: _config_of(name, model, options) for name, options in adapters.items()}
    with seeded(seed):
        return MixedModel(model, configs)


def from_pretrained(model: Any, folder: str | Path, *, is_trainable: bool = False) -> MixedModel:
    """Add saved adapters to a transformers model, which is changed in place; all are active.

    Args:
        folder: what `MixedModel.save_pretrained` wrote (a folder for each adapter), or one adapter's own folder, whose
            name the adapter gets.
        is_trainable: whether their weights learn from here on.

    Raises:
        JobError: it holds no adapters, or of a kind that cannot be mixed, or weights that are missing or not theirs.
    """
    from peft import PeftConfig
    from safetensors.torch import load_file

    folder = Path(folder)
    folders = [folder] if (folder / _CONFIG).is_file() else sorted(f.parent for f in folder.glob(f"*/{_CONFIG}"))
    if not folders:
        raise JobError("folder", f"{folder} holds no {_CONFIG}, nor do folders in it", "name a folder of adapters")
    configs = {f.name: PeftConfig.from_pretrained(str(f)) for f in folders}
    for config in configs.values():
        config.inference_mode = not is_trainable
    mixed = MixedModel(model, configs)
    for f in folders:
        mixed._load(f.name, load_file(f / WEIGHTS))
    return mixed


class MixedModel(torch.nn.Module):
    """A transformers model with several adapters of PEFT's, called like the model itself.

    Adapters of one kind share PEFT's layers, which add up what the active ones give; PEFT's layers of another kind lie
    around those. Made by `prepare_model` and `from_pretrained`.

    Attributes:
        model: the transformers model; its layers hold the adapters.
        active: names of the active adapters.
    """

    def __init__(self, model: Any, configs: Mapping[str, Any]) -> None:
        super().__init__()
        if not configs:
            raise JobError("adapters", "none is given", "give at least one name with its options")
        self._configs = {name: _checked(name, config) for name, config in configs.items()}
        self._wrappers: dict[str, Any] = {}  # kind -> PeftModel around `model`; in a dict, so no submodules of ours
        for kind in _KINDS:
            for name, config in self._configs.items():
                if config.peft_type == kind:
                    self._add(model, kind, name, config)
        self.model = model
        self.active: tuple[str, ...] = ()
        self.activate(*self._configs)

    def _add(self, model: Any, kind: str, name: str, config: Any) -> None:
        from peft import get_peft_model

        try:
            with warnings.catch_warnings():
                # of names that are part of "lora_" (we set every weight on our own), and of a model with adapters
                warnings.filterwarnings("ignore", "Adapter name", UserWarning)
                warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT", UserWarning)
                warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
                if kind in self._wrappers:
                    self._wrappers[kind].add_adapter(name, config)
                else:
                    self._wrappers[kind] = get_peft_model(model, config, adapter_name=name)
        except ValueError as error:
            raise JobError(f"adapters.{name}", str(error), "see the model's module names") from None
        if getattr(config, "target_parameters", None):
            raise JobError(
                f"adapters.{name}",
                "this model keeps its experts in one tensor, and adapters of those cannot be mixed",
                "give target_modules outside the experts, such as q_proj,k_proj,v_proj,o_proj",
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``generate`` with the active adapters."""
        return self.model.generate(*args, **kwargs)

    def activate(self, *names: str) -> None:
        """Make these adapters, and no others, compute and learn.

        Raises:
            JobError: there is no adapter of a name.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._refuse_unknown(names)
        self.active = tuple(name for name in self._configs if name in names)
        for layer in self.model.modules():
            if isinstance(layer, BaseTunerLayer):
                # layer by layer: PEFT's switch of a whole model turns all kinds off
                chosen = [name for name in self.active if name in layer._all_available_adapter_names()]
                layer.enable_adapters(bool(chosen))
                layer.set_adapter(chosen)
        for name, parameter in self.model.named_parameters():
            owner = self._owner(name)
            parameter.requires_grad_(owner in self.active and not self._configs[owner].inference_mode)

    def deactivate(self, *names: str) -> None:
        """Leave these adapters (none given: all) out from here on; they keep their weights."""
        self._refuse_unknown(names)
        self.activate(*[name for name in self.active if names and name not in names])

    def merge(self) -> Any:
        """Take the active adapters into the weights, and drop all; returns the transformers model, as it was before.

        This object is of no use afterwards.

        Raises:
            RunError: the model is quantised, and the sum would be rounded to its few values again; or an adapter is on
                one of two tied weights.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        if getattr(self.model, "is_quantized", False):
            raise RunError("adapters cannot be merged into a quantised model", "load the adapters on its whole weights")

        parted = adapted_ties(self.model)
        if parted:
            raise RunError(f"adapters change {parted[0]}, which is also another weight (tied)", "use them unmerged")
        tops = [(n, m) for n, m in self.model.named_modules() if isinstance(m, BaseTunerLayer) and not _is_inside(n)]
        for name, top in tops:
            chain: list[Any] = []
            inner: Any = top
            while isinstance(inner, BaseTunerLayer):
                chain.append(inner)
                inner = inner.base_layer  # type: ignore[attr-defined]
            for layer in reversed(chain):  # LoRA first: (IA)^3 scales the sum
                mine = [n for n in self.active if n in layer._all_available_adapter_names()]
                if mine:
                    layer.merge(safe_merge=True, adapter_names=mine)
            parent, _, attribute = name.rpartition(".")
            setattr(self.model.get_submodule(parent), attribute, inner)
        self._configs, self._wrappers, self.active = {}, {}, ()
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write each adapter into ``folder/<name>``, as PEFT reads it; active or not."""
        from safetensors.torch import save_file

        folder = Path(folder)
        for name, config in self._configs.items():
            entries = {
                key: self.model.get_parameter(held).detach().cpu().clone().contiguous()
                for key, held in self._names(name).items()
            }
            config = copy.deepcopy(config)
            config.inference_mode = True
            with written_whole(folder / name) as new:
                save_file(entries, new / WEIGHTS, {"format": "pt"})
                config.save_pretrained(new)

    def _load(self, name: str, entries: dict[str, torch.Tensor]) -> None:
        held = self._names(name)
        differing = sorted(held.keys() ^ entries.keys())
        if differing:
            raise JobError(
                f"adapters.{name}",
                f"its weights are not those that its config describes on this model ({differing[0]})",
                "load it on the model it was trained on",
            )
        with torch.no_grad():
            for key, tensor in entries.items():
                self.model.get_parameter(held[key]).copy_(tensor)

    def _names(self, adapter: str) -> dict[str, str]:
        """{name in PEFT's files: name in our model} of an adapter's weights.

        PEFT's files know neither the adapter's name nor the layers of other kinds around it.
        """
        found = {}
        for held, _ in self.model.named_parameters():
            if self._owner(held) == adapter:
                words = [word for word in held.split(".") if word != "base_layer"]
                place = next(i for i, word in enumerate(words) if word.startswith(_PREFIXES))
                del words[place + 1]  # the adapter's name
                found[".".join(["base_model", "model", *words])] = held
        return found

    def _owner(self, parameter_name: str) -> str:
        """The adapter that a weight belongs to; "" for the model's own."""
        words = parameter_name.split(".")
        for word, following in pairwise(words):
            if word.startswith(_PREFIXES) and following in self._configs:
                return following
        return ""

    def _refuse_unknown(self, names: tuple[str, ...]) -> None:
        for name in names:
            if name not in self._configs:
                raise JobError("adapters", f"there is no {name!r}", f"there are {', '.join(self._configs)}")


def _config_of(name: str, model: Any, options: Section) -> Any:
    """PEFT's config for a tuner's options, which their class's own file makes."""
    tuner = getattr(importlib.import_module(type(options).__module__), "TUNER", None)
    if tuner is None or not hasattr(tuner, "peft_config"):
        raise JobError(f"adapters.{name}", "these are no options of an adapter", "use those of lora, qlora or ia3")
    if isinstance(options, LoraOptions) and (changes_base(options) or options.bias != "none"):
        raise JobError(
            f"adapters.{name}", "with this init or bias it would change the weights that others build on", "use default"
        )
    require_found(model, options, f"adapters.{name}")
    config = tuner.peft_config(model, options, None)
    config.task_type = None  # with one, PEFT would copy a classification head for each adapter
    return config


def _checked(name: str, config: Any) -> Any:
    """Raises:
    JobError: a name or a kind of adapter that cannot be mixed with others.
    """
    if config.peft_type not in _KINDS:
        raise JobError(
            f"adapters.{name}", f"{config.peft_type.value} cannot be mixed with others", f"use {' or '.join(_KINDS)}"
        )
    if getattr(config, "modules_to_save", None) or getattr(config, "bias", "none") != "none":
        raise JobError(f"adapters.{name}", "it brings whole weights of its own", "load it with PEFT, or merge it first")
    if not name or "." in name or name.startswith(_PREFIXES) or name == "base_layer":
        raise JobError("adapters", f"{name!r} is no name of an adapter", "use a word without dots")
    return config


def _is_inside(name: str) -> bool:
    """Whether a layer of PEFT's lies within another one."""
    return name.endswith(".base_layer")
