"""A transformers model whose weights stay in files: read by the names that the model has for them, written by turns.

A file's names are not always the model's, and some weights of a model are several of a file (the experts of a layer).
What becomes of what is transformers' own knowledge, which it uses as it loads and saves
(``transformers/core_model_loading.py``); here the same functions are asked, first on the meta device, for plans.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_dist.converters.reading import Reader, as_torch
from swift_dist.converters.safetensors_io import INDEX_NAME, HFFolder, TensorSpec, index_text, lay_out, plan_shards
from swift_dist.converters.stored import BY_TORCH, TO_TORCH, StoredTensor
from swift_dist.errors import RunError

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 24


class NotStreamed(Exception):
    """Why the weights of a model cannot be read and written one at a time. Its whole can."""


@dataclass(frozen=True)
class _Group:
    """Tensors of files that become weights of the model together.

    Args:
        stored: their names in the files, each with the pattern of `converter` that it matches.
        converter: transformers' WeightConverter; None: one tensor, as it is.
        weights: what they become: by the model's names, on the meta device.
    """

    stored: tuple[tuple[str, str | None], ...]
    converter: Any
    weights: Mapping[str, torch.Tensor]


class StoredModel:
    """The weights of a folder by the names that a model has for them.

    The model learns which of transformers' conversions the files needed (``_weight_conversions``, as `from_pretrained`
    does), which is what they are undone by when it is saved.

    Attributes:
        weights: what the files hold of the model, on the meta device: shapes and dtypes.
        unknown: names of tensors that no weight of the model is made of.

    Args:
        model: on the meta device.

    Raises:
        NotStreamed: a conversion of transformers' cannot be planned.
    """

    def __init__(self, folder: HFFolder, model: Any) -> None:
        self._tensors, self._model = folder.tensors, model
        found, self.unknown = self._placed()
        self._group_of: dict[str, _Group] = {}
        self.weights: dict[str, torch.Tensor] = {}
        for first, stored in found.items():
            converter = stored[0][1]
            if len(stored) > 1 and any(c is not converter for _, c, _ in stored):
                raise NotStreamed(f"several tensors of the files are {first}")
            if len(stored) > 1 and converter is None:
                raise NotStreamed(f"{stored[0][0]} and {stored[1][0]} are both {first}")
            names = tuple((name, pattern) for name, _, pattern in stored)
            blank = [_blank(self._tensors[name]) for name, _ in names]
            weights = self._converted(_Group(names, converter, {first: blank[0]}), blank)
            for name in weights:
                self._group_of[name] = _Group(names, converter, weights)
            self.weights |= weights
        self._name_ties()

    def _name_ties(self) -> None:
        """Know a weight that is another's, too, by the name that transformers keeps of the two."""
        import torch

        for alias, kept in tied_weights(self._model).items():
            if alias not in self.weights:
                continue
            if kept in self.weights:
                if not torch.equal(self.read([alias])[alias], self.read([kept])[kept]):
                    raise NotStreamed(f"{alias} and {kept} are one weight by config.json, and two in the files")
                continue
            group = self._group_of[alias]
            if group.converter is not None:
                raise NotStreamed(f"{alias} is made of several tensors, and is also {kept}")
            self.weights[kept] = group.weights[alias]
            self._group_of[kept] = _Group(group.stored, None, {kept: group.weights[alias]})

    def _placed(self) -> tuple[dict[str, list[tuple[str, Any, str | None]]], list[str]]:
        """As ``convert_and_load_state_dict_in_model`` does it: (first weight -> what it is made of, what is none)."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        state, prefix = self._model.state_dict(), self._model.base_model_prefix
        conversions = get_model_conversion_mapping(self._model)
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        found: dict[str, list[tuple[str, Any, str | None]]] = {}
        unknown = []
        for stored in sorted(self._tensors, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, state)
            if name not in state and stored in state:
                name, pattern = rename_source_key(stored, [], [], prefix, state)
            if name in state:
                found.setdefault(name, []).append((stored, by_pattern.get(pattern) if pattern else None, pattern))
            else:
                unknown.append(stored)
        self._model._weight_conversions = [c for c in conversions if c.was_used()]
        return found, unknown

    def _converted(self, group: _Group, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        first = next(iter(group.weights))
        if group.converter is None:
            return {first: tensors[0]}
        converter = copy.deepcopy(group.converter)
        for (stored, pattern), tensor in zip(group.stored, tensors, strict=True):
            converter.add_tensor(first, stored, pattern, tensor)
        try:
            made = converter.convert(first, model=self._model, config=self._model.config)
        except Exception as error:  # an operation of any architecture's
            raise NotStreamed(f"{first} cannot be made of {group.stored[0][0]} alone: {error}") from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Weights in the dtypes of the files, with those that are made of the same tensors.

        Raises:
            RunError: a file is damaged.
        """
        groups = {id(group): group for group in (self._group_of[name] for name in names)}
        read: dict[str, torch.Tensor] = {}
        for group in groups.values():
            reader = Reader()  # each its own: closed, a mapped file takes no memory
            read |= self._converted(group, [as_torch(reader.read(self._tensors[name])) for name, _ in group.stored])
            reader.close()
        return read

    def kept(self, piece: Piece) -> dict[str, StoredTensor] | None:
        """Where the tensors of a piece lie as they are to be written; None: they lie nowhere like that."""
        if any(name not in self._group_of for name in piece.names):
            return None
        stored = {name for weight in piece.names for name, _ in self._group_of[weight].stored}
        # one tensor is what it is under any name; several are compared by theirs
        pairs = {next(iter(piece.specs)): next(iter(stored))} if len(stored) == len(piece.specs) == 1 else None
        if pairs is None:
            if stored != piece.specs.keys():
                return None
            pairs = {name: name for name in stored}
        found = {name: self._tensors[held] for name, held in pairs.items()}
        for name, spec in piece.specs.items():
            held = found[name]
            if (held.shape, held.dtype) != (spec.shape, spec.dtype) or held.extents[0].archive or held.scale:
                return None
        return found

    def sources_of_unknown(self) -> list[Source]:
        """The tensors of the files that are none of the model's, as they are."""
        sources = []
        for name in self.unknown:
            stored = self._tensors[name]
            if stored.extents[0].archive:
                raise NotStreamed(f"{name} is no part of the model, and not in a safetensors file")
            sources.append(Source({name: TensorSpec(name, stored.shape, stored.dtype)}, {name: stored}))
        return sources


def tied_weights(model: Any) -> dict[str, str]:
    """Names of weights that are another one of a transformers model, too -> the name that it keeps."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


@dataclass(frozen=True)
class Piece:
    """Weights of a model that are written together.

    Args:
        names: the model's.
        specs: the tensors of files that they become.
    """

    names: tuple[str, ...]
    specs: Mapping[str, TensorSpec]


def pieces_of(model: Any, weights: Mapping[str, torch.Tensor]) -> list[Piece]:
    """What a model's weights become in files, in the smallest pieces that transformers can convert.

    Args:
        weights: all that is to be written, in order: by the model's names, of the shapes and dtypes to write, on the
            meta device.

    Raises:
        NotStreamed: they cannot be told apart.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter, apply_converters

    if getattr(model, "_weight_conversions", None) is None:  # as revert_weight_conversion has it of a new model
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        model._weight_conversions = [c for c in conversions if not isinstance(c, PrefixChange)]
    reverse = [c.reverse_transform() for c in model._weight_conversions[::-1]]
    converters = [c for c in reverse if isinstance(c, WeightConverter)]
    groups: dict[str, list[str]] = {}
    for name in weights:
        key, pattern = apply_converters(name, converters)
        groups.setdefault(key if pattern else name, []).append(name)
    pieces = []
    for names in groups.values():
        stored = stored_form(model, {name: weights[name] for name in names})
        specs = {key: TensorSpec(key, tuple(t.shape), BY_TORCH[_name_of(t.dtype)]) for key, t in stored.items()}
        pieces.append(Piece(tuple(names), specs))
    written = Counter(name for piece in pieces for name in piece.specs)
    if written.keys() != stored_form(model, weights).keys() or written.total() != len(written):
        raise NotStreamed("transformers writes weights of this architecture only all together")
    return pieces


def stored_form(model: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights as the architecture's files have them, by their names there.

    Raises:
        NotStreamed: they are a part that cannot be converted by itself.
    """
    from transformers.core_model_loading import revert_weight_conversion

    try:
        found: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(weights))
    except Exception as error:  # an operation of any architecture's
        raise NotStreamed(f"{next(iter(weights))} cannot be written by itself: {error}") from error
    return found


@dataclass(frozen=True)
class Source:
    """Where the tensors of some files come from.

    Args:
        specs: the tensors.
        kept: where they lie already, byte for byte.
        make: makes them anew; asked where `kept` is None.
    """

    specs: Mapping[str, TensorSpec]
    kept: Mapping[str, StoredTensor] | None
    make: Callable[[], Mapping[str, torch.Tensor]] | None = None


def write_tensors(folder: Path, sources: Sequence[Source], max_shard_size: int) -> None:
    """Write safetensors files, and their index, one source after the other: no more than one is in memory.

    Raises:
        RunError: the disk has no room; a file cannot be read or written.
    """
    specs = [spec for source in sources for spec in source.specs.values()]
    shards = plan_shards(specs, max_shard_size)
    layout = lay_out(shards)
    _require_room(folder, sum(file.size for file in layout.files))
    try:
        with ExitStack() as opened:
            files: dict[str, int] = {}
            for file in layout.files:
                files[file.name] = descriptor = os.open(folder / file.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                opened.callback(os.close, descriptor)
                for offset, literal in file.literals:
                    _write(descriptor, memoryview(literal), offset)
            for source in sources:
                made = source.make() if source.kept is None and source.make else {}
                for name, spec in source.specs.items():
                    place = layout.tensors[name].extents[0]
                    if source.kept is not None:
                        _copy(source.kept[name], spec.num_bytes, files[place.file], place.offset)
                    else:
                        _write(files[place.file], _bytes_of(made[name], spec), place.offset)
        index = index_text(shards)
        if index is not None:
            (folder / INDEX_NAME).write_text(index, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error}", "free space, or correct it, and try again") from None


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"the disk is full: {folder.parent} has {free / 2**30:.2f} GiB free, {needed / 2**30:.2f} are needed",
            "free space and try again",
        )


def _copy(stored: StoredTensor, num_bytes: int, target: int, offset: int) -> None:
    extent = stored.extents[0]
    with Path(extent.file).open("rb", buffering=0) as file:
        file.seek(extent.offset)
        while num_bytes:
            chunk = file.read(min(num_bytes, _CHUNK))
            if not chunk:
                raise RunError(f"{extent.file} is damaged: {stored.name} is cut off", "get the file again")
            _write(target, memoryview(chunk), offset)
            offset, num_bytes = offset + len(chunk), num_bytes - len(chunk)


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _bytes_of(tensor: torch.Tensor, spec: TensorSpec) -> memoryview:
    import torch

    assert tuple(tensor.shape) == spec.shape, f"{spec.name} is {list(tensor.shape)}, not {list(spec.shape)}"
    assert BY_TORCH[_name_of(tensor.dtype)] == spec.dtype, f"{spec.name} is {tensor.dtype}, not {spec.dtype}"
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _blank(stored: StoredTensor) -> torch.Tensor:
    import torch

    return torch.empty(stored.shape, dtype=getattr(torch, TO_TORCH[stored.values_dtype]), device="meta")


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_config(model: Any, folder: Path, dtype: torch.dtype, base: Path | None = None) -> None:
    """Write what stands beside the weights of a model: config.json, its code, how it generates.

    Args:
        dtype: of most weights.
        base: whose generation_config.json it gets, where it has one; else the model's own.
    """
    from transformers.dynamic_module_utils import custom_object_save

    model.config.dtype = _name_of(dtype)
    model.config.architectures = [type(model).__name__]
    if model.is_remote_code():
        custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    theirs = base / "generation_config.json" if base else None
    if theirs is not None and theirs.is_file():
        shutil.copyfile(theirs, folder / theirs.name)
    elif model.can_generate():
        model.generation_config.save_pretrained(folder)


def most_common_dtype(weights: Iterable[torch.Tensor]) -> torch.dtype:
    """Of the floating-point weights, by their numbers of elements."""
    dtypes: Counter[torch.dtype] = Counter()
    for tensor in weights:
        if tensor.is_floating_point():
            dtypes[tensor.dtype] += tensor.numel()
    return dtypes.most_common(1)[0][0]
