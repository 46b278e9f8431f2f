"""LoRA adapters as rows: PEFT's tensors <-> those of Megatron modules with adapters. Pure Python, no torch.

PEFT (``peft/tuners/lora/layer.py``) keeps two matrices beside each adapted projection, and computes with
``W + B @ A * scaling``:

    base_model.model.<projection>.lora_A.weight [r, in]        base_model.model.<projection>.lora_B.weight [out, r]

Megatron's side is that of NVIDIA-NeMo/Megatron-Bridge (src/megatron/bridge/peft): ``AdapterWrapper.sharded_state_dict``
(adapter_wrapper.py) stores a module's adapter under ``<module>.adapter.``, as ``linear_in`` (A) and ``linear_out`` (B)
(``ParallelLinearAdapter.sharded_state_dict`` in utils.py). A projection that Megatron fuses has one of two forms:

    canonical   ...linear_qkv.adapter.adapter_q, _k, _v; ...linear_fc1.adapter.adapter_gate, _up: each with an A of its
                own, as in PEFT (``CanonicalLoRA.transform`` in canonical_lora.py). Written and read, bit for bit.
    fused       ...linear_qkv.adapter.linear_in, linear_out: one A for all, B interleaved as the fused weight is
                (``LoRA.transform`` in lora.py). Read: every projection gets that A, and its rows of B.

Whether A or B is split over tensor-parallel ranks, and how, is in ``LoRAMerge.merge`` (lora.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from swift_dist.converters.dist_index import DistSide
from swift_dist.converters.mapping import (
    QKV,
    Direct,
    Duplicate,
    Embedding,
    Experts,
    GatedMLP,
    Row,
    Rows,
    TensorMap,
    hf_shapes,
)
from swift_dist.converters.plan import Delta, HFSide, Hold, Side, make_plan, promoted, repeated_names
from swift_dist.converters.stored import Extent, StoredTensor, moved, overlap
from swift_dist.errors import JobError

PEFT_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_LORA_NAME = re.compile(rf"^{re.escape(PEFT_PREFIX)}(.+)\.lora_[AB]\.weight$")
_PARTS = {"QKV": ("adapter_q", "adapter_k", "adapter_v"), "GatedMLP": ("adapter_gate", "adapter_up")}


@dataclass(frozen=True)
class Slot:
    """A place where a model may have an adapter, for all its layers.

    Args:
        megatron: the adapter's module; may hold ``{layer}`` and ``{expert}``, as `hf`.
        hf: the projections that it serves: one, or those of a fused matrix that share A.
        base: row of the weight.
        out, inner: the size of the projection that it serves (of all of them together, if they are several).
        num_experts: routed experts; 0: it is not in one.
    """

    megatron: str
    hf: tuple[str, ...]
    base: Direct | QKV | GatedMLP | Embedding
    out: int
    inner: int
    num_experts: int = 0

    def rows(self, layers: tuple[int, ...], rank: int) -> list[Row | Duplicate]:
        """Rows of the adapters of some layers (empty: it is not in a layer)."""
        axis = self.base.split_axis if isinstance(self.base, Direct) else 0
        into, out = f"{self.megatron}.linear_in.weight", f"{self.megatron}.linear_out.weight"
        a = tuple(f"{PEFT_PREFIX}{name}{_A}" for name in self.hf)
        b = tuple(f"{PEFT_PREFIX}{name}{_B}" for name in self.hf)
        first, second = Direct(into, a[0], (rank, self.inner), axis, layers), self._out_row(out, b, rank, axis, layers)
        repeated = [
            Duplicate(_fill(other, layer, expert), _fill(a[0], layer, expert))
            for other in a[1:]
            for layer in layers or (None,)
            for expert in range(self.num_experts) or (None,)
        ]
        if not self.num_experts:
            return [first, second, *repeated]
        assert isinstance(second, (Direct, GatedMLP))
        return [Experts(first, self.num_experts), Experts(second, self.num_experts), *repeated]

    def _out_row(
        self, name: str, hf: tuple[str, ...], rank: int, axis: int | None, layers: tuple[int, ...]
    ) -> Direct | QKV | GatedMLP | Embedding:
        if isinstance(self.base, Embedding):
            return Embedding(name, hf[0], self.out, rank)
        if len(hf) == 1:
            return Direct(name, hf[0], (self.out, rank), None if axis is None else 0, layers)
        assert isinstance(self.base, (QKV, GatedMLP))
        return replace(self.base, megatron=name, hf=hf, columns=rank, layers=layers)  # type: ignore[arg-type]


def slots(rows: Iterable[Row | Duplicate]) -> Iterator[Slot]:
    """Everywhere that a model may have an adapter: its matrices but for the embedding."""
    for row in rows:
        if isinstance(row, Duplicate):
            continue
        base, experts = (row.row, row.num_experts) if isinstance(row, Experts) else (row, 0)
        assert isinstance(base, (Direct, QKV, GatedMLP, Embedding))
        module = f"{base.megatron.removesuffix('.weight')}.adapter"
        if not base.megatron.endswith(".weight"):
            continue
        names = tuple(name.removesuffix(".weight") for name in ([base.hf] if isinstance(base.hf, str) else base.hf))
        if isinstance(base, Direct):
            if len(base.shape) == 2:
                yield Slot(module, names, base, *base.shape, num_experts=experts)
        elif isinstance(base, Embedding):
            # A tied one is the embedding itself, to which PEFT's adapters of a projection do not apply.
            if base.megatron == "output_layer.weight" and not base.tied_copy:
                yield Slot(module, names, base, base.vocab_size, base.hidden_size)
        elif base.columns is not None:
            if isinstance(base, QKV):
                sizes = [heads * base.head_dim for heads in (base.num_heads, base.num_groups, base.num_groups)]
            else:
                sizes = [base.ffn_hidden_size] * 2
            for part, name, out in zip(_PARTS[type(base).__name__], names, sizes, strict=True):
                yield Slot(f"{module}.{part}", (name,), base, out, base.columns, experts)
            yield Slot(module, names, base, sum(sizes), base.columns, experts)


RankOf = Callable[[Slot, int | None, int | None], int | None]
"""(place, layer, expert) -> the rank of the adapter that is there; None: there is none."""


def adapter_rows(rows: Iterable[Row | Duplicate], rank_of: RankOf, key: str) -> Rows:
    """The rows of an adapter.

    Args:
        rows: of the model.
        key: of the option that errors name.

    Raises:
        JobError: some experts of a layer have an adapter and others none, or one of another rank.
    """
    found: list[Row | Duplicate] = []
    for slot in slots(rows):
        by_rank: dict[int, list[int | None]] = {}
        for layer in slot.base.layers or (None,):
            rank = _one_rank(slot, layer, rank_of, key)
            if rank is not None:
                by_rank.setdefault(rank, []).append(layer)
        for rank, layers in by_rank.items():
            found += slot.rows(tuple(layer for layer in layers if layer is not None), rank)
    return tuple(found)


def _one_rank(slot: Slot, layer: int | None, rank_of: RankOf, key: str) -> int | None:
    ranks = {rank_of(slot, layer, expert) for expert in range(slot.num_experts) or (None,)}
    if len(ranks) > 1:
        name = _fill(slot.hf[0], layer, None)
        raise JobError(
            key,
            f"the experts of {name} have adapters of ranks {sorted(rank or 0 for rank in ranks)} (0: none)",
            "Megatron stores the experts of a layer as one tensor: give all of them an adapter of one rank",
        )
    return ranks.pop()


def peft_ranks(tensors: Mapping[str, StoredTensor]) -> RankOf:
    """Ranks from the tensors of a PEFT folder."""
    ranks = {
        match[1]: stored.shape[0]
        for name, stored in tensors.items()
        if name.endswith(_A) and stored.shape and (match := _LORA_NAME.match(name))
    }

    def rank_of(slot: Slot, layer: int | None, expert: int | None) -> int | None:
        return ranks.get(_fill(slot.hf[0], layer, expert)) if len(slot.hf) == 1 else None

    return rank_of


def dist_ranks(side: DistSide) -> RankOf:
    """Ranks from the tensors of a torch_dist checkpoint, whatever the style of its keys."""

    def rank_of(slot: Slot, layer: int | None, expert: int | None) -> int | None:
        name = _fill(f"{slot.megatron}.linear_in.weight", layer, expert)
        try:
            hold = side.hold(TensorMap(name, (1, 1), (), layer=layer, expert=expert))[0]
        except KeyError:
            return None
        shape = side.tensors[hold.name].shape
        return shape[-2] if len(shape) > 1 else 0

    return rank_of


def is_adapter(names: Collection[str]) -> bool:
    """Whether the tensors of a torch_dist checkpoint are those of an adapter."""
    return any(".adapter." in name for name in names)


@dataclass(frozen=True)
class Lora:
    """What an adapter_config.json says of the computation.

    Args:
        config: the whole file.
    """

    config: Mapping[str, Any] = field(hash=False)

    def rank(self, projection: str) -> int:
        """r of a projection (``model.layers.0.self_attn.q_proj``)."""
        return int(self._stated("rank_pattern", "r", projection))

    def scaling(self, projection: str) -> float:
        """What B @ A is multiplied by: alpha / r, or alpha / sqrt(r) (``LoraLayer.update_layer``)."""
        alpha, rank = self._stated("alpha_pattern", "lora_alpha", projection), self.rank(projection)
        return float(alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank)

    def _stated(self, pattern: str, default: str, projection: str) -> Any:
        """The first of the patterns that the name ends with, as regular expressions (peft/utils/other.py,
        ``get_pattern_key``)."""
        for ending, value in (self.config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({ending})$", projection):
                return value
        return self.config[default]


_UNDERSTOOD = frozenset(
    """
    alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config exclude_modules
    inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout
    lora_ga_config megatron_config megatron_core peft_type peft_version qalora_group_size r rank_pattern revision
    target_modules task_type use_rslora velora_config
    """.split()
)
"""Keys that are read here, or that tell how an adapter was trained and not what it computes."""
_PLAIN_STARTS = (True, False, None, "true", "gaussian", "orthogonal", "eva")
_WHAT = {
    "use_dora": "DoRA rescales the whole weight, which an adapter of Megatron does not",
    "modules_to_save": "it holds whole modules beside the adapters",
    "fan_in_fan_out": "its weights are transposed",
    "target_parameters": "it adapts parameters that are no projections (PEFT's way with the experts of a mixture)",
    "lora_bias": "its adapters have biases",
}


def check_lora(config: Mapping[str, Any], key: str) -> Lora:
    """Accept an adapter_config.json, or refuse what its tensors alone do not say.

    Raises:
        JobError: it is not LoRA, or has a part that would be lost without a word.
    """
    if config.get("peft_type") not in (None, "LORA"):
        raise JobError(key, f"peft_type {config['peft_type']!r} is not converted", "only LORA is")
    for name, value in config.items():
        if value and name not in _UNDERSTOOD:
            why = _WHAT.get(name, "this version does not know what it changes")
            raise JobError(key, f"the adapter has {name} {value!r}, which is not converted: {why}", "use plain LoRA")
    if config.get("bias", "none") != "none":
        raise JobError(
            key, f"the adapter has bias {config['bias']!r}: it trains biases of the model", "use bias 'none'"
        )
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise JobError(
            key,
            f"the adapter has init_lora_weights {start!r}, which changes the weights that it is added to",
            "save it with PEFT's path_initial_model_for_weight_conversion: it is a plain adapter then",
        )
    for name in ("r", "lora_alpha"):
        if isinstance(config.get(name), bool) or not isinstance(config.get(name), (int, float)):
            raise JobError(key, f"adapter_config.json states no {name}", "state it: it decides how B @ A is scaled")
    return Lora(dict(config))


def projections(rows: Iterable[Row | Duplicate]) -> dict[str, int]:
    """The projections that an adapter of these rows serves, with their ranks.

    Raises:
        ValueError: one of them twice.
    """
    shapes = hf_shapes(rows)
    return {name.removeprefix(PEFT_PREFIX).removesuffix(_A): shapes[name][0] for name in shapes if name.endswith(_A)}


def check_ranks(rows: Iterable[Row | Duplicate], lora: Lora, key: str) -> None:
    """The tensors have the ranks that adapter_config.json states: the scaling follows from those.

    Raises:
        JobError: naming the first that has not.
    """
    for name, rank in projections(rows).items():
        if lora.rank(name) != rank:
            raise JobError(
                key,
                f"the adapter of {name} has rank {rank}, adapter_config.json says {lora.rank(name)}",
                "use the adapter_config.json that belongs to it",
            )


def check_peft_names(tensors: Mapping[str, StoredTensor], rows: Iterable[Row | Duplicate], key: str) -> None:
    """Every tensor of a PEFT folder is one of its rows'.

    Raises:
        JobError: naming what is not.
    """
    known = hf_shapes(rows)
    for name in sorted(tensors):
        if "lora_embedding_" in name:
            raise JobError(
                key, f"{name} adapts an embedding, which is not converted", "leave embeddings out of target_modules"
            )
        if ".lora_" not in name:
            raise JobError(
                key,
                f"{name} is a weight of the model itself, of which an adapter's folder is not expected to hold any",
                "save the adapter by save_pretrained(..., save_embedding_layers=False)",
            )
        if name not in known:
            missing = [other for other in known if _LORA_NAME.sub(r"\1", other) == _LORA_NAME.sub(r"\1", name)]
            what = "has no row in this model" if not missing else f"stands beside {missing[0]}"
            raise JobError(key, f"{name} {list(tensors[name].shape)} {what}", "give the model that it was trained on")
    if not known:
        raise JobError(key, "the adapter holds no LoRA tensors", "download it completely")


def deltas(rows: Iterable[Row | Duplicate], side: Side, lora: Lora) -> dict[str, Delta]:
    """What an adapter adds to each weight, by the weight's Hugging Face name.

    Args:
        rows, side: of the adapter.
    """
    rows = tuple(rows)
    dtype = promoted(stored.values_dtype for stored in side.tensors.values())
    wanted = {
        name: StoredTensor(name, shape, dtype, (Extent("", 0, tuple((0, extent) for extent in shape)),))
        for name, shape in hf_shapes(rows).items()
    }
    plan = make_plan(rows, side, HFSide(wanted, repeated_names(rows, wanted)))
    matrices = {region.stored.name: region for region in plan.regions}
    found = {}
    for name in projections(rows):
        a, b = matrices[f"{PEFT_PREFIX}{name}{_A}"], matrices[f"{PEFT_PREFIX}{name}{_B}"]
        box = ((0, b.stored.shape[0]), (0, a.stored.shape[1]))
        found[f"{name}.weight"] = Delta(b, a, lora.scaling(name), box)
    return found


@dataclass(frozen=True)
class MergedSide:
    """The weights of a model with an adapter added to them.

    Args:
        base: where the weights lie.
        deltas: by Hugging Face name (`deltas`).
    """

    base: Side
    deltas: Mapping[str, Delta]

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return self.base.tensors

    def hold(self, tensor: TensorMap) -> Iterator[Hold]:
        """As the base's; cut into the parts of Hugging Face tensors where something is added to one of them."""
        if not any(piece.hf in self.deltas for piece in tensor.pieces):
            yield from self.base.hold(tensor)
            return
        for hold in self.base.hold(tensor):
            for piece in tensor.pieces:
                shared = overlap(hold.at, piece.megatron_box)
                if shared is None:
                    continue
                delta = self.deltas.get(piece.hf)
                if delta is not None:
                    delta = replace(delta, box=moved(shared, piece.megatron_box, piece.hf_box))
                yield Hold(hold.name, moved(shared, hold.at, hold.box), shared, delta)


def _fill(name: str, layer: int | None, expert: int | None) -> str:
    filled = name if layer is None else name.replace("{layer}", str(layer))
    return filled if expert is None else filled.replace("{expert}", str(expert))
