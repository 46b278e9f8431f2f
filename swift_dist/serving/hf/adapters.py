"""PEFT adapters on a model that serves: loaded and forgotten between two steps, mixed in one batch where PEFT can.

Plain LoRA rows of different adapters, and rows without one, share a forward (PEFT's `adapter_names`). What PEFT does
not mix (DoRA, other methods, whole modules of an adapter) is computed in a forward of its own, with that adapter
alone active.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from swift_dist.errors import JobError
from swift_dist.serving.options import EngineOptions

_BASE = "__base__"  # PEFT's name for rows without an adapter
_WEIGHTS = "adapter_model.safetensors"
# What acts on prompts or needs the whole batch to be its own.
_PROMPT_METHODS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT")


class Adapters:
    """The adapters of one model.

    Args:
        model: transformers'; adapters are put into it in place.
        batched: whether rows are computed together at all.
    """

    def __init__(self, model: Any, options: EngineOptions, *, batched: bool) -> None:
        self._model, self._options, self._batched = model, options, batched
        self._peft: Any = None
        self._mixable: dict[str, bool] = {}
        self._inner: dict[str, str] = {}  # name -> what PEFT calls it
        self._number = itertools.count()
        self._retired: set[str] = set()
        self._active: str | None = None  # what PEFT's layers are set to: an adapter, "" for none; None: unknown

    @property
    def names(self) -> tuple[str, ...]:
        """Those that new requests may name."""
        return tuple(name for name in tuple(self._mixable) if name not in self._retired)

    def has(self, name: str) -> bool:
        """Whether it is in the model: it may be computed with, though new requests may not name it any more."""
        return name in self._inner

    def load(self, name: str, path: str) -> None:
        """Put an adapter into the model.

        Raises:
            JobError: it is no adapter that this model can take; the model is as before.
        """
        config = self._checked(name, path)
        from peft import PeftConfig, PeftModel

        # A name of our own: PEFT finds weights by it, and takes those of an adapter called "a" for others' ("lora_A").
        inner = f"served{next(self._number)}x"
        try:
            if self._peft is None:
                # Not from_pretrained: were the weights wrong, the model would be wrapped and nobody could unwrap it.
                self._peft = PeftModel(self._model, PeftConfig.from_pretrained(path), adapter_name=inner)
            device = str(self._model.device)
            found = self._peft.load_adapter(path, adapter_name=inner, is_trainable=False, torch_device=device)
            if odd := [*found.unexpected_keys, *found.missing_keys]:
                raise ValueError(f"weights that are not of this model, or are missing: {', '.join(odd[:3])}")
        except Exception as error:
            self._forget(inner)
            raise JobError(
                "adapters", f"{name}: {path} does not fit this model: {error}", "check which model it was trained on"
            ) from error
        self._peft.eval().requires_grad_(False)
        self._inner[name] = inner
        self._mixable[name] = _mixable(config)
        self._active = None

    def _checked(self, name: str, path: str) -> dict[str, Any]:
        """The adapter's configuration, once it may be loaded."""
        remedy = "give the folder that PEFT's save_pretrained wrote"
        if name in self._mixable:
            raise JobError("adapters", f"{name} is taken", "unload it first, or choose another name")
        if not name:
            raise JobError("adapters", "an adapter has a name", "give it one")
        if self._options.max_loras == 0:
            raise JobError("max_loras", "0: no adapters can be loaded", "start with --max_loras 1 or more")
        folder = Path(path)
        for file in ("adapter_config.json", _WEIGHTS):
            if not (folder / file).is_file():
                raise JobError("adapters", f"{name}: {path} has no {file}", remedy)
        try:
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise JobError("adapters", f"{name}: its adapter_config.json cannot be read: {error}", remedy) from error
        method = config.get("peft_type")
        if not isinstance(method, str) or method in _PROMPT_METHODS:
            raise JobError("adapters", f"{name}: {method} is not served by the hf engine", "use LoRA or another method")
        if config.get("bias", "none") != "none" or config.get("layer_replication"):
            # PEFT would write these over the base model's own: every other row's answer would change.
            raise JobError("adapters", f"{name} changes the base model's biases or layers", "merge it: --merge_lora")
        rank = max([config.get("r") or 0, *(config.get("rank_pattern") or {}).values()])
        if rank > self._options.max_lora_rank:
            raise JobError(
                "max_lora_rank", f"{name} has rank {rank}, more than {self._options.max_lora_rank}", f"give {rank}"
            )
        return config

    def retire(self, name: str) -> None:
        """No new request may name it. KeyError: there is no such adapter."""
        if name not in self.names:
            raise KeyError(name)
        self._retired.add(name)

    def unload(self, name: str) -> None:
        """Take a retired adapter out of the model; no row uses it any more."""
        self._forget(self._inner.pop(name))
        self._mixable.pop(name)
        self._retired.discard(name)

    def _forget(self, inner: str) -> None:
        """Take an adapter out of the model; the model's own modules are back once none is left."""
        if self._peft is None or inner not in self._peft.peft_config:
            return
        if len(self._peft.peft_config) > 1:
            self._peft.delete_adapter(inner)
        else:
            self._peft.unload()
            self._peft = None
        self._active = None

    def calls(self, rows: Sequence[str | None]) -> Iterator[tuple[Callable[..., Any], list[int]]]:
        """Forwards that compute these rows: what to call, and which rows. An adapter is active while its turn lasts."""
        if self._peft is None:
            yield self._model, list(range(len(rows)))
            return
        together = self._batched and all(self._mixable.values())
        mixed = [at for at, name in enumerate(rows) if self._mixable.get(name or "", together)]
        names = {rows[at] for at in mixed}
        if self._batched and len(names) > 1:
            yield functools.partial(self._mixed, [rows[at] for at in mixed]), mixed
            rest = sorted(set(range(len(rows))) - set(mixed))
        else:
            rest = list(range(len(rows)))
        for name in dict.fromkeys(rows[at] for at in rest):
            yield functools.partial(self._alone, name or ""), [at for at in rest if rows[at] == name]

    def _alone(self, name: str, **inputs: Any) -> Any:
        """A forward with one adapter, or none ("")."""
        self._activate(name)
        return self._model(**inputs)

    def _mixed(self, names: Sequence[str | None], **inputs: Any) -> Any:
        """A forward of rows that have an adapter each, or none."""
        self._activate(next(name for name in names if name))
        try:
            return self._peft(**inputs, adapter_names=[self._inner[name] if name else _BASE for name in names])
        except Exception:
            # PEFT 0.21 leaves the hooks that hand each layer its rows' adapters where a forward raises.
            for module in self._peft.modules():
                for number, hook in tuple(module._forward_pre_hooks.items()):
                    if getattr(getattr(hook, "func", None), "__name__", "") == "_adapter_names_pre_forward_hook":
                        del module._forward_pre_hooks[number]
                        module._forward_pre_hooks_with_kwargs.pop(number, None)
            raise

    def _activate(self, name: str) -> None:
        """Set PEFT's layers to one adapter, or to none ("")."""
        if self._active == name:
            return
        before, self._active = self._active, None  # unknown, should one of these fail
        if name:
            if before in ("", None):
                self._peft.base_model.enable_adapter_layers()
            self._peft.set_adapter(self._inner[name], inference_mode=True)
        else:
            self._peft.base_model.disable_adapter_layers()
        self._active = name


def _mixable(config: dict[str, Any]) -> bool:
    """Whether PEFT computes this adapter beside others in one batch (`LoraLayer._mixed_batch_forward`)."""
    own = (
        "use_dora",
        "modules_to_save",
        "trainable_token_indices",
        "alora_invocation_tokens",
        "lora_bias",
        "target_parameters",
    )
    return config.get("peft_type") == "LORA" and not any(config.get(key) for key in own)
