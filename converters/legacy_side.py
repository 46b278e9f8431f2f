"""Where a Megatron tensor's parts lie in Megatron-LM's legacy checkpoints: one file a rank, each with what it holds.

Ranks (megatron/core/parallel_state.py, order "tp-cp-ep-dp-pp"): within a pipeline stage, rank r has tensor rank r % TP;
for the experts it has expert tensor rank r % ETP and expert rank (r // ETP) % EP. A file is named by tensor, pipeline
and expert rank, so not every pair of tensor and expert rank exists: TP 2, EP 2, ETP 1 are two files, (0, 0) and (1, 1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from swift_dist.converters.mapping import Duplicate, Piece, Row, TensorMap, expand
from swift_dist.converters.plan import Hold
from swift_dist.converters.stored import StoredTensor

_LAYER = re.compile(r"^(decoder\.layers\.)\d+\.")
_EXPERT = re.compile(r"(\.mlp\.experts\.)local_experts\.(\d+)\.")
_ALIASES = (  # norms of layers that are not Transformer Engine's (gpt_layer_specs.py, get_gpt_layer_local_spec)
    (".self_attention.linear_qkv.layer_norm_weight", ".input_layernorm.weight"),
    (".mlp.linear_fc1.layer_norm_weight", ".pre_mlp_layernorm.weight"),
    (".self_attention.linear_q_up_proj.layer_norm_weight", ".self_attention.q_layernorm.weight"),
    (".self_attention.linear_kv_up_proj.layer_norm_weight", ".self_attention.kv_layernorm.weight"),
)


@dataclass(frozen=True, order=True)
class Rank:
    """Coordinates that name a file: pipeline, tensor and expert rank."""

    pp: int
    tp: int
    ep: int


@dataclass(frozen=True)
class Grid:
    """The parallel layout of a checkpoint.

    Args:
        vpp: model chunks of each pipeline stage (virtual pipeline stages).
        etp: ranks that an expert is split over; it divides tp.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    vpp: int = 1
    etp: int = 1

    def ranks(self) -> list[Rank]:
        """All that have a file."""
        period = math.lcm(self.tp, self.etp * self.ep)
        pairs = {(rank % self.tp, rank // self.etp % self.ep) for rank in range(period)}
        return [Rank(pp, tp, ep) for pp in range(self.pp) for tp, ep in sorted(pairs)]

    def folder(self, rank: Rank) -> str:
        """``get_checkpoint_name`` in megatron/training/checkpointing.py."""
        stage = f"_{rank.pp:03d}" if self.pp > 1 else ""
        return f"mp_rank_{rank.tp:02d}{stage}" + (f"_{rank.ep:03d}" if self.ep > 1 else "")

    def chunks(self) -> list[tuple[int, int]]:
        """(pipeline rank, virtual stage) of each model chunk, in the order of the layers."""
        return [(stage, virtual) for virtual in range(self.vpp) for stage in range(self.pp)]

    def stored_name(self, rank: Rank, virtual: int, key: str) -> str:
        model = f"model{virtual}/" if self.vpp > 1 else ""
        return f"{self.folder(rank)}/{model}{key}"


@dataclass(frozen=True)
class Shard:
    """What a rank of a split holds of a tensor.

    Args:
        part: the rank's tensor. Its pieces map the whole tensor (``hf_box``) to the rank's (``megatron_box``).
        names: stored tensors that hold it, all alike; the first is the one to read.
        missing: names that should be among them.
    """

    part: TensorMap
    names: tuple[str, ...]
    missing: tuple[str, ...] = ()


@dataclass
class RankSide:
    """The weights of a legacy checkpoint, or of what is going to be one.

    Args:
        layers: how many layers each chunk has, in the order of `Grid.chunks`.
        num_experts: of a layer; 0: a dense model.
        written: it is a target: every place of a part is handed out. Else only the first, the others being copies.
        tied: second holders (`tied_copies`) that are written too.
    """

    tensors: Mapping[str, StoredTensor]
    grid: Grid
    layers: Sequence[int]
    num_experts: int = 0
    written: bool = False
    tied: Mapping[str, TensorMap] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._stages: dict[int, list[Rank]] = {}
        for rank in self.grid.ranks():
            self._stages.setdefault(rank.pp, []).append(rank)

    def hold(self, tensor: TensorMap) -> list[Hold]:
        """Raises KeyError: a part is in no file."""
        holds = []
        for shard in self.shards(tensor):
            if shard.missing:
                raise KeyError(shard.missing[0])
            names = shard.names if self.written else shard.names[:1]
            pieces = shard.part.pieces
            holds += [Hold(name, piece.megatron_box, piece.hf_box) for name in names for piece in pieces]
        return holds

    def replicas(self, rows: Iterable[Row | Duplicate]) -> list[tuple[StoredTensor, StoredTensor]]:
        """Pairs of stored tensors that must be equal: norms on every tensor rank, what is not an expert's on every
        expert rank, the last stage's copies of the embedding."""
        rows = tuple(rows)
        tied = tied_copies(rows)
        return [
            (self.tensors[shard.names[0]], self.tensors[other])
            for tensor in expand(rows)
            if not tensor.tied_copy
            for shard in self.shards(tensor, tied)
            for other in shard.names[1:]
        ]

    def shards(self, tensor: TensorMap, tied: Mapping[str, TensorMap] | None = None) -> list[Shard]:
        """Every part that the ranks hold of a tensor, with its places.

        Raises:
            ValueError: the tensor does not split so, or what is stored has too few rows.
        """
        copy = (self.tied if tied is None else tied).get(tensor.name)
        places = self.places(tensor)
        if not places:
            return []  # a second holder that this checkpoint does not have
        copies = [] if copy is None else self.places(copy)
        size = self.num_parts(tensor)
        shards = []
        for index in range(size):
            names = [name for part, name in places if part == index]
            names += [name for part, name in copies if part == index and name in self.tensors]
            there = tuple(name for name in names if name in self.tensors)
            missing = tuple(name for name in names if name not in self.tensors)
            padded = None
            if tensor.padded and there and self.tensors[there[0]].shape:
                padded = self.tensors[there[0]].shape[0] * size
            shards.append(Shard(whole_to_part(tensor, index, size, padded), there, missing))
        return shards

    def num_parts(self, tensor: TensorMap) -> int:
        """Into how many parts a tensor is split."""
        if tensor.split_axis is None:
            return 1
        return self.grid.tp if tensor.expert is None else self.grid.etp

    def holders(self, tensor: TensorMap, stage: int) -> Iterator[tuple[int, Rank]]:
        """(part, rank) of every rank of a pipeline stage that holds a part of the tensor."""
        num_parts = self.num_parts(tensor)
        for rank in self._stages[stage]:
            if tensor.expert is None or rank.ep == tensor.expert // (self.num_experts // self.grid.ep):
                yield rank.tp % num_parts, rank

    def chunk_of(self, layer: int) -> tuple[int, int]:
        """(index in `Grid.chunks`, number within it) of a layer."""
        for index, count in enumerate(self.layers):
            if layer < count:
                return index, layer
            layer -= count
        raise KeyError(f"layer {layer}")

    def local_key(self, tensor: TensorMap) -> str:
        """What the rank's own state dict calls it: layers and experts are numbered within the chunk and the rank."""
        key = tensor.name
        if tensor.layer is not None:
            local = self.chunk_of(tensor.layer)[1]
            key = _LAYER.sub(lambda match: f"{match[1]}{local}.", key)
        if tensor.expert is not None:
            expert = tensor.expert % (self.num_experts // self.grid.ep)
            key = _EXPERT.sub(lambda match: f"{match[1]}local_experts.{expert}.", key)
        return key

    def places(self, tensor: TensorMap) -> list[tuple[int, str]]:
        """(part, stored name) of all that should hold a part. Every chunk that has a tensor outside the layers counts:
        with multi-token prediction the embedding is in two. Where none has it: as it would be called in the first."""
        chunks, key = self.grid.chunks(), self.local_key(tensor)
        if tensor.layer is not None:
            chunks = [chunks[self.chunk_of(tensor.layer)[0]]]
        found: list[tuple[int, str]] = []
        expected: list[tuple[int, str]] = []
        for stage, virtual in chunks:
            holders = list(self.holders(tensor, stage))
            for spelled in spellings(key):
                named = [(part, self.grid.stored_name(rank, virtual, spelled)) for part, rank in holders]
                expected = expected or named
                if any(name in self.tensors for _, name in named):
                    found += named
                    break
        return found or ([] if tensor.tied_copy else expected)


def spellings(key: str) -> Iterator[str]:
    """The keys under which a rank may hold a tensor: SequentialMLP's and TEGroupedMLP's names of experts, Transformer
    Engine's and others' names of norms."""
    yield key
    if _EXPERT.search(key):
        yield grouped_key(key)
    for ours, other in _ALIASES:
        if key.endswith(ours):
            yield key.removesuffix(ours) + other


def grouped_key(key: str) -> str:
    """TEGroupedMLP's name of an expert's tensor: ``mlp.experts.linear_fc1.weight<e>``."""
    match = _EXPERT.search(key)
    return key if match is None else _EXPERT.sub(r"\1", key) + match[2]


def whole_to_part(tensor: TensorMap, index: int, size: int, padded_rows: int | None) -> TensorMap:
    """What part `index` of `size` holds, with pieces from the whole tensor's box to the part's.

    Raises ValueError as `TensorMap.shard`.
    """
    box = tuple((0, extent) for extent in tensor.shape)
    return replace(tensor, pieces=(Piece(tensor.name, box, box),)).shard(index, size, padded_rows)


def tied_copies(rows: Iterable[Row | Duplicate]) -> dict[str, TensorMap]:
    """Second holders of a weight (`TensorMap.tied_copy`), by the name of the tensor that owns it."""
    tensors = list(expand(rows, layers=(), experts=()))
    owners = {tensor.pieces: tensor.name for tensor in tensors if not tensor.tied_copy}
    return {owners[tensor.pieces]: tensor for tensor in tensors if tensor.tied_copy}
