"""An adapter merged into its base with one module's weights in memory at a time.

PEFT wraps a model on the meta device, where weights have shapes and no values, and loads the adapter. Then each adapted
module gets its weights from the base's files, PEFT's own `merge` of that module computes, in fp32, and the result is
written. What the adapter does not touch is copied byte for byte.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from swift_dist.converters.safetensors_io import HFFolder
from swift_dist.errors import JobError
from swift_dist.tuners import _stored
from swift_dist.tuners._loading import load_adapter, merging, refuse_parted, refuse_parted_beneath
from swift_dist.tuners._stored import NotStreamed, Piece, Source, StoredModel

if TYPE_CHECKING:
    import torch

BY_MODULE = frozenset(
    "LORA ADALORA IA3 LOHA LOKR OFT BOFT VERA FOURIERFT HRA LN_TUNING C3A MISS RANDLORA TRAINABLE_TOKENS".split()
)
"""PEFT's kinds that merge a module with nothing but its weights and the adapter's tensors: each has a test."""
_PLAIN_STARTS = (True, False, None, "true", "gaussian", "orthogonal", "eva")
"""Of LoRA: other starts change the base as they are loaded."""
_FOR_UNMERGING = "trainable_tokens_original"  # rows of the base that PEFT keeps


def merge_by_module(
    base: Path, adapter: Path, config: Any, empty_model: Callable[[], Any], new: Path, max_shard_size: int
) -> None:
    """Write into the folder `new` what `merge` does.

    Args:
        config: PEFT's, of the adapter.
        empty_model: makes the base's model on the meta device.

    Raises:
        NotStreamed: this adapter, or this architecture, needs the whole model.
        JobError: base and adapter do not belong together, or one of them is not whole.
    """
    _refuse_whole(config)
    model, wrapped_model = empty_model(), empty_model()
    stored = StoredModel(HFFolder(base, "base"), model)
    _check_shapes(stored, model, base)
    merger = _Merger(stored, wrapped_model, adapter, config)
    weights = _weights(stored, model, merger, base)
    dtype = _stored.most_common_dtype(stored.weights.values())
    sources = [_source(piece, stored, model, merger, weights) for piece in _stored.pieces_of(model, weights)]
    sources += _unknown(stored, model, base)
    _stored.write_tensors(new, sources, max_shard_size)
    _stored.write_config(model, new, dtype, base)


def _refuse_whole(config: Any) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in BY_MODULE:
        raise NotStreamed(f"adapters of the kind {kind} are merged all at once")
    if kind == "ADALORA" and config.rank_pattern:
        raise NotStreamed("PEFT makes AdaLoRA's matrices with all their ranks first, and cuts those down")
    start = getattr(config, "init_lora_weights", None)
    if kind == "LORA" and start not in _PLAIN_STARTS:
        raise NotStreamed(f"init_lora_weights {start!r} takes the adapter's first values out of the base's")


def _check_shapes(stored: StoredModel, model: Any, base: Path) -> None:
    for name, tensor in model.state_dict().items():
        held = stored.weights.get(name)
        if held is not None and held.shape != tensor.shape:
            raise JobError(
                "base",
                f"{base}: {name} has the shape {list(held.shape)}, config.json says {list(tensor.shape)}",
                "use the config.json that belongs to these weights",
            )


def _weights(stored: StoredModel, model: Any, merger: _Merger, base: Path) -> dict[str, torch.Tensor]:
    """All that is to be written: by the model's names, in their shapes and dtypes, on the meta device.

    A weight that the base's config ties to another is written once, under the name that transformers keeps.
    """
    tied = _stored.tied_weights(model)
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    dtype = _stored.most_common_dtype(stored.weights.values())
    weights = {}
    for name, tensor in model.state_dict().items():
        if name in tied:
            merger.check_tie(name, tied[name])
        elif name not in ignored:
            held = stored.weights.get(name)
            if held is None and name not in merger.changed:
                _refuse_missing(name, model, base)
            weights[name] = tensor.to(held.dtype if held is not None else dtype)
    return weights


def _refuse_missing(name: str, model: Any, base: Path) -> NoReturn:
    may_miss = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    if name not in dict(model.named_parameters()) or any(re.search(pattern, name) for pattern in may_miss):
        raise NotStreamed(f"the model computes {name}, which its files lack")
    raise JobError("base", f"{base} lacks {name}", "download the model completely")


def _source(piece: Piece, stored: StoredModel, model: Any, merger: _Merger, weights: dict[str, torch.Tensor]) -> Source:
    if not any(name in merger.changed for name in piece.names):
        kept = stored.kept(piece)
        if kept is not None:
            return Source(piece.specs, kept)

    def make() -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        unchanged = [name for name in piece.names if name not in merger.changed]
        if unchanged:
            found |= stored.read(unchanged)
        for name in piece.names:
            value = merger.take(name) if name in merger.changed else found[name]
            found[name] = value.to(weights[name].dtype)
        return _stored.stored_form(model, {name: found[name] for name in piece.names})

    return Source(piece.specs, None, make)


def _unknown(stored: StoredModel, model: Any, base: Path) -> list[Source]:
    """What the base's files hold beside the model that transformers makes of them, such as layers that predict more
    than one token: kept, unless the adapter's task made another model of it."""
    architectures = json.loads((base / "config.json").read_text(encoding="utf-8")).get("architectures") or ()
    return stored.sources_of_unknown() if type(model).__name__ in architectures else []


class _Merger:
    """PEFT's model of an adapter around a base without values, and the weights that it changes.

    Attributes:
        changed: names of the model's weights that lie in adapted modules, or come from the adapter as they are.
    """

    def __init__(self, stored: StoredModel, model: Any, adapter: Path, config: Any) -> None:
        self._stored, self._adapter = stored, adapter
        model.float()
        state = model.state_dict(keep_vars=True)
        self._names = {id(tensor): name for name, tensor in reversed(state.items())}
        self._state = state  # the ids above are of objects that live
        self._wrapped = load_adapter(model, adapter, config, on_meta=True)
        refuse_parted_beneath(self._wrapped)
        self._modules = self._adapted()
        self._module_of = {name: key for key in self._modules for name in state if name.startswith(f"{key}.")}
        self._merged: dict[str, torch.Tensor] = {}
        for name, tensor in self._inner.state_dict().items():
            if name in state and name not in self._module_of and not tensor.is_meta:
                self._merged[name] = tensor  # a bias, or an embedding that was saved with the adapter
        self.changed = self._module_of.keys() | self._merged.keys()
        self._require_loaded()

    @property
    def _inner(self) -> Any:
        return self._wrapped.base_model.model

    def _adapted(self) -> dict[str, Any]:
        """The modules that `merge_and_unload` replaces (peft/tuners/tuners_utils.py, _unload_and_optionally_merge)."""
        found: dict[str, Any] = {}
        for key, module in self._inner.named_modules():
            inside = any(key.startswith(f"{outer}.") for outer in found)
            if not inside and (hasattr(module, "unload_and_optionally_merge_module") or hasattr(module, "base_layer")):
                found[key] = module
        return found

    def _require_loaded(self) -> None:
        for key, module in self._modules.items():
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                if tensor.is_meta and id(tensor) not in self._names and _FOR_UNMERGING not in name:
                    raise NotStreamed(f"the adapter computes {key}.{name} from the base's weights")

    def check_tie(self, alias: str, kept: str) -> None:
        """Refuse an adapter that changes one of two weights that are the same."""
        import torch

        if alias not in self.changed and kept not in self.changed:
            return
        for name in (alias, kept):
            if name not in self.changed:
                refuse_parted(alias)
        twin = self.take(alias)
        if not torch.equal(twin, self._value(kept)):
            refuse_parted(alias)

    def _value(self, name: str) -> torch.Tensor:
        if name not in self._merged:
            self._merge(self._module_of[name])
        return self._merged[name]

    def take(self, name: str) -> torch.Tensor:
        """A changed weight, in fp32; each once."""
        value = self._value(name)
        del self._merged[name]
        return value

    def _merge(self, key: str) -> None:
        """Merge one module: its weights are in memory meanwhile, and what comes out of it until it is taken."""
        module = self._modules.pop(key)
        places = [
            (holder, attribute, tensor)
            for owner in module.modules()
            for holder in (owner._parameters, owner._buffers)
            for attribute, tensor in holder.items()
            if tensor is not None and tensor.is_meta and id(tensor) in self._names
        ]
        self._fill(places)
        with merging(self._adapter):
            plain = _unwrapped(module)
        for name, tensor in plain.state_dict().items():
            if tensor.is_meta:
                raise NotStreamed(f"{key}.{name} is no part of the base or the adapter")
            self._merged[f"{key}.{name}"] = tensor.detach()
        for holder, attribute, tensor in places:
            holder[attribute] = tensor

    def _fill(self, places: list[tuple[dict[str, Any], str, torch.Tensor]]) -> None:
        """Put values where tensors without any are."""
        import torch

        names = {self._names[id(tensor)] for _, _, tensor in places}
        read = self._stored.read(names & self._stored.weights.keys())
        values = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in read.items()}
        for holder, attribute, tensor in places:
            value = values.get(self._names[id(tensor)])
            if value is None:
                continue  # a head that the base lacks and the adapter brings
            is_weight = isinstance(tensor, torch.nn.Parameter)
            holder[attribute] = torch.nn.Parameter(value, requires_grad=False) if is_weight else value


def _unwrapped(module: Any) -> Any:
    """The module that `merge_and_unload` puts in the place of an adapted one.

    Raises:
        NotStreamed: it needs more than this module.
    """
    try:
        if hasattr(module, "unload_and_optionally_merge_module"):
            return module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        module.merge(safe_merge=True)
        return module.get_base_layer()
    except (NotImplementedError, RuntimeError) as error:  # torch's of tensors without values
        raise NotStreamed(f"PEFT cannot merge a {type(module).__name__} by itself: {error}") from error


def empty(kind: Any, config: Any, trust_remote_code: bool) -> Any:
    """A transformers model on the meta device.

    Raises:
        NotStreamed: its code needs values.
    """
    import torch

    try:
        with torch.device("meta"):
            model = kind.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
        model.tie_weights()
    except Exception as error:  # code of any architecture
        raise NotStreamed(f"the model cannot be made without its weights: {error}") from error
    return model.eval()
