"""Weight mappings as index maps: (Hugging Face tensor, box) <-> (Megatron tensor, box). Pure Python, no torch.

A *row* (`Direct`, `QKV`, `GatedMLP`, `Embedding`, `Experts`, `Duplicate`) describes one kind of tensor for all its
layers; a family declares its rows once, in swift_dist/models/<family>.py. `expand` turns rows into one `TensorMap` a
Megatron tensor: its whole shape and the `Piece`s that it consists of. A piece is read in either direction.
`TensorMap.shard` clips the pieces to what one tensor-parallel rank holds. Loading, exporting and byte plans all derive
from these three; nothing else knows a layout.

Megatron names are *global*: the layer and the expert are numbered over the whole model, experts as SequentialMLP names
them (``...mlp.experts.local_experts.<e>.linear_fc1.weight``). `global_name` translates a live module's parameter name
into it, `checkpoint_key` translates it into the key of a torch_dist checkpoint. Multi-token-prediction layers
(``mtp.layers.<k>.``) are numbered by themselves and belong to no layer of the decoder.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

Box = tuple[tuple[int, int], ...]
"""A rectangular part of a tensor: (start, stop) for each dimension."""


def slices(box: Box) -> tuple[slice, ...]:
    """The box as an index: ``tensor[slices(box)]``."""
    return tuple(slice(start, stop) for start, stop in box)


def box_shape(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def box_size(box: Box) -> int:
    size = 1
    for extent in box_shape(box):
        size *= extent
    return size


@dataclass(frozen=True, slots=True)
class Piece:
    """``megatron[megatron_box] == hf[hf_box]``: the two boxes have the same shape."""

    hf: str
    hf_box: Box
    megatron_box: Box


@dataclass(frozen=True, slots=True)
class TensorMap:
    """One Megatron tensor and where each part of it comes from.

    Args:
        name: its global Megatron name.
        shape: its whole shape, before any split and without vocabulary padding.
        pieces: disjoint; together they cover the whole shape.
        split_axis: the dimension that tensor parallelism splits; None: every rank holds all of it.
        stripes: the split axis consists of this many equal stripes and each of them is split over the ranks. A gated
            fc1 has two, gate and up: rank r holds gate's r-th part followed by up's r-th part.
        layer: its layer, numbered over the whole model; None: not inside a layer.
        expert: its expert, numbered over the whole layer; then expert tensor parallelism splits it, not TP.
        padded: Megatron may store more rows than shape[0] (vocabulary padding). Those rows are zero when loaded from
            Hugging Face, and dropped when exported.
        tied_copy: a second holder of weights that another tensor owns: the last pipeline stage's output layer of a
            model with tied embeddings. It exists in live models only, neither in checkpoints nor in Hugging Face.
        keep_dtype: stays in the dtype that it is stored in whatever dtype is asked for, because the model computes with
            it in that dtype (a router's correction bias).
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    split_axis: int | None = None
    stripes: int = 1
    layer: int | None = None
    expert: int | None = None
    padded: bool = False
    tied_copy: bool = False
    keep_dtype: bool = False

    def shard(self, rank: int, size: int, padded_rows: int | None = None) -> TensorMap:
        """What rank `rank` of `size` tensor-parallel ranks holds (expert-tensor-parallel ranks for an expert).

        Args:
            padded_rows: whole rows including vocabulary padding; for `padded` maps only. Rows that no piece covers
                are padding.

        Raises:
            ValueError: the split axis is not divisible.
        """
        whole = list(self.shape)
        if padded_rows is not None:
            if not self.padded or padded_rows < whole[0]:
                raise ValueError(f"{self.name} has {whole[0]} rows and cannot be padded to {padded_rows}")
            whole[0] = padded_rows
        axis = self.split_axis
        if axis is None or size == 1:
            return replace(self, shape=tuple(whole))
        if whole[axis] % (self.stripes * size):
            raise ValueError(f"{self.name}: {whole[axis]} does not split into {self.stripes} x {size} equal parts")
        stripe = whole[axis] // self.stripes
        width = stripe // size
        pieces = tuple(
            clipped
            for index in range(self.stripes)
            for piece in self.pieces
            if (clipped := _clip(piece, axis, index * stripe + rank * width, width, index * width)) is not None
        )
        whole[axis] = self.stripes * width
        return replace(self, shape=tuple(whole), pieces=pieces)


def _clip(piece: Piece, axis: int, start: int, width: int, offset: int) -> Piece | None:
    """The part of a piece with start <= Megatron index < start + width along `axis`, moved so that start -> offset."""
    first, last = piece.megatron_box[axis]
    low, high = max(first, start), min(last, start + width)
    if low >= high:
        return None
    hf_first = piece.hf_box[axis][0]
    moved = (low - start + offset, high - start + offset)
    taken = (hf_first + low - first, hf_first + high - first)
    return Piece(piece.hf, _with(piece.hf_box, axis, taken), _with(piece.megatron_box, axis, moved))


def _with(box: Box, axis: int, interval: tuple[int, int]) -> Box:
    return (*box[:axis], interval, *box[axis + 1 :])


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A Hugging Face tensor that repeats another one and that Megatron holds once; the two must be equal.

    Args:
        hf, of: the repetition and what it repeats.
        required: every folder has it, and an export writes it. Else it may be there, and is not written.
    """

    hf: str
    of: str
    required: bool = True


class Row(Protocol):
    """One kind of Megatron tensor. Names may hold ``{layer}`` and ``{expert}``."""

    @property
    def layers(self) -> tuple[int, ...]: ...

    def at(self, layer: int | None, expert: int | None = None) -> TensorMap: ...


@dataclass(frozen=True)
class Direct:
    """A tensor that both sides hold alike: norms, biases, output projections, the router.

    Args:
        megatron, hf: names.
        shape: whole shape.
        split_axis, keep_dtype: see `TensorMap`.
        layers: the layers that have it; empty: it is not in a layer.
    """

    megatron: str
    hf: str
    shape: tuple[int, ...]
    split_axis: int | None = None
    layers: tuple[int, ...] = ()
    keep_dtype: bool = False

    def at(self, layer: int | None, expert: int | None = None) -> TensorMap:
        box = tuple((0, extent) for extent in self.shape)
        return TensorMap(
            name=_fill(self.megatron, layer, expert),
            shape=self.shape,
            pieces=(Piece(_fill(self.hf, layer, expert), box, box),),
            split_axis=self.split_axis,
            layer=layer,
            expert=expert,
            keep_dtype=self.keep_dtype,
        )


@dataclass(frozen=True)
class QKV:
    """Query, key and value projections in one matrix, interleaved by key-value group.

    Megatron's rows are, for each group g in order: the query heads of g, then its key head, then its value head
    (``SelfAttention.get_query_key_value_tensors`` in megatron/core/transformer/attention.py). With fewer groups than
    tensor-parallel ranks a rank simply holds its 1/TP of these rows and megatron gathers them in the forward pass, so
    the same map serves.

    Args:
        hf: names of the query, key and value tensors.
        columns: width of the matrices (hidden size); None: these are the biases.
    """

    megatron: str
    hf: tuple[str, str, str]
    num_heads: int
    num_groups: int
    head_dim: int
    columns: int | None
    layers: tuple[int, ...] = ()

    def at(self, layer: int | None, expert: int | None = None) -> TensorMap:
        q_name, k_name, v_name = (_fill(name, layer, expert) for name in self.hf)
        q_rows = self.num_heads // self.num_groups * self.head_dim
        columns: Box = () if self.columns is None else ((0, self.columns),)
        pieces, row = [], 0
        for group in range(self.num_groups):
            for name, rows in ((q_name, q_rows), (k_name, self.head_dim), (v_name, self.head_dim)):
                hf_rows = (group * rows, (group + 1) * rows)
                pieces.append(Piece(name, (hf_rows, *columns), ((row, row + rows), *columns)))
                row += rows
        return TensorMap(
            name=_fill(self.megatron, layer, expert),
            shape=(row,) if self.columns is None else (row, self.columns),
            pieces=tuple(pieces),
            split_axis=0,
            layer=layer,
            expert=expert,
        )


@dataclass(frozen=True)
class GatedMLP:
    """Gate and up projection in one matrix: all gate rows, then all up rows; each half is split over the ranks.

    Args:
        hf: names of the gate and the up tensor.
        ffn_hidden_size: rows of each of them.
        columns: width (hidden size); None: these are the biases.
    """

    megatron: str
    hf: tuple[str, str]
    ffn_hidden_size: int
    columns: int | None
    layers: tuple[int, ...] = ()

    def at(self, layer: int | None, expert: int | None = None) -> TensorMap:
        rows = self.ffn_hidden_size
        columns: Box = () if self.columns is None else ((0, self.columns),)
        pieces = tuple(
            Piece(_fill(name, layer, expert), ((0, rows), *columns), ((half * rows, (half + 1) * rows), *columns))
            for half, name in enumerate(self.hf)
        )
        return TensorMap(
            name=_fill(self.megatron, layer, expert),
            shape=(2 * rows,) if self.columns is None else (2 * rows, self.columns),
            pieces=pieces,
            split_axis=0,
            stripes=2,
            layer=layer,
            expert=expert,
        )


@dataclass(frozen=True)
class Embedding:
    """A matrix with one row a token: the embedding or the output layer. Megatron pads it (`TensorMap.padded`)."""

    megatron: str
    hf: str
    vocab_size: int
    hidden_size: int
    tied_copy: bool = False

    @property
    def layers(self) -> tuple[int, ...]:
        return ()

    def at(self, layer: int | None = None, expert: int | None = None) -> TensorMap:
        box = ((0, self.vocab_size), (0, self.hidden_size))
        return TensorMap(
            name=self.megatron,
            shape=(self.vocab_size, self.hidden_size),
            pieces=(Piece(self.hf, box, box),),
            split_axis=0,
            padded=True,
            tied_copy=self.tied_copy,
        )


@dataclass(frozen=True)
class Experts:
    """A row that exists once for every routed expert; its names hold ``{expert}``."""

    row: Direct | GatedMLP
    num_experts: int

    @property
    def layers(self) -> tuple[int, ...]:
        return self.row.layers

    def at(self, layer: int | None, expert: int | None = None) -> TensorMap:
        return self.row.at(layer, expert)


def _fill(name: str, layer: int | None, expert: int | None) -> str:
    return name.replace("{layer}", str(layer)).replace("{expert}", str(expert))


Rows = tuple[Row | Duplicate, ...]
"""The rows of a whole model."""


def expand(
    rows: Iterable[Row | Duplicate], layers: Collection[int] | None = None, experts: Collection[int] | None = None
) -> Iterator[TensorMap]:
    """Every Megatron tensor that the rows describe, or only those of some layers and experts (None: of all)."""
    for row in rows:
        if isinstance(row, Duplicate):
            continue
        for layer in row.layers or (None,):
            if layer is not None and layers is not None and layer not in layers:
                continue
            if isinstance(row, Experts):
                wanted = range(row.num_experts) if experts is None else experts
                yield from (row.at(layer, expert) for expert in wanted)
            else:
                yield row.at(layer)


def weights(rows: Iterable[Row | Duplicate]) -> Iterator[TensorMap]:
    """Every Megatron tensor that a checkpoint stores: `expand` without second holders (`TensorMap.tied_copy`)."""
    return (tensor for tensor in expand(rows) if not tensor.tied_copy)


def duplicates(rows: Iterable[Row | Duplicate]) -> tuple[Duplicate, ...]:
    """The repetitions among the rows."""
    return tuple(row for row in rows if isinstance(row, Duplicate))


def hf_shapes(rows: Iterable[Row | Duplicate]) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor that a folder must hold, with its shape.

    Raises:
        ValueError: the pieces of a tensor do not add up to it: the rows are wrong.
    """
    rows = tuple(rows)
    extents: dict[str, list[int]] = {}
    sizes: dict[str, int] = {}
    for tensor in weights(rows):
        for piece in tensor.pieces:
            stops = [stop for _, stop in piece.hf_box]
            extents[piece.hf] = [max(pair) for pair in zip(extents.get(piece.hf, stops), stops, strict=True)]
            sizes[piece.hf] = sizes.get(piece.hf, 0) + box_size(piece.hf_box)
    for name, extent in extents.items():
        if box_size(tuple((0, stop) for stop in extent)) != sizes[name]:
            raise ValueError(f"the rows do not cover {name} exactly once")
    shapes = {name: tuple(extent) for name, extent in extents.items()}
    return shapes | {row.hf: shapes[row.of] for row in duplicates(rows) if row.required}


_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)\.")  # not mtp.layers: they are all on the last pipeline stage
_EXPERT = re.compile(r"(\.mlp\.experts\.)local_experts\.(\d+)\.")
_GROUPED = re.compile(r"(\.mlp\.experts\.)(linear_fc[12]\.(?:weight|bias))(\d+)$")


def global_name(live: str, layer_offset: int = 0, expert_offset: int = 0) -> str:
    """The global name of a live parameter, as `expand` yields it.

    Args:
        live: its name inside a GPTModel chunk (no ``module.`` prefixes). Layers and experts are numbered from 0 within
            the chunk and the rank; TEGroupedMLP's ``linear_fc1.weight<e>`` is understood beside SequentialMLP's names.
        layer_offset: layers of the whole model before this chunk.
        expert_offset: experts of the layer before this rank's.
    """
    name = _GROUPED.sub(r"\1local_experts.\3.\2", live)
    name = _LAYER.sub(lambda match: f"{match[1]}{int(match[2]) + layer_offset}.", name)
    return _EXPERT.sub(lambda match: f"{match[1]}local_experts.{int(match[2]) + expert_offset}.", name)


def checkpoint_key(name: str) -> tuple[str, int | None]:
    """The torch_dist key of a global name, and the index along its first dimension where experts share one tensor.

    megatron-core stores all experts of a layer as one tensor [num_experts, ...] under ``mlp.experts.experts.``
    (``SequentialMLP.sharded_state_dict`` and ``TEGroupedMLP.sharded_state_dict`` in transformer/moe/experts.py).
    """
    match = _EXPERT.search(name)
    if match is None:
        return name, None
    return _EXPERT.sub(r"\1experts.", name), int(match[2])
