"""`ParallelLayout`: how many ways each axis is split, and which coordinates a rank has. Pure arithmetic, no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from swift_dist.config import ParallelSection

Axis = Literal["tp", "cp", "dp", "pp", "dp_cp", "ep", "etp", "expert_dp"]
AXES: tuple[Axis, ...] = ("tp", "cp", "dp", "pp", "dp_cp", "ep", "etp", "expert_dp")


@dataclass(frozen=True)
class Coordinates:
    """A rank's place on every axis. (tp, cp, dp, pp) locate it among dense weights, (etp, ep, expert_dp, pp) among
    experts."""

    tp: int
    cp: int
    dp: int
    pp: int
    ep: int
    etp: int
    expert_dp: int


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """Degrees of parallelism over `world_size` ranks, in megatron-core's default order "tp-cp-ep-dp-pp".

    The same ranks form two grids that share the pipeline axis (first axis varies fastest):

        dense weights:   rank = tp + TP * (cp + CP * (dp + DP * pp)),           DP  = world / (TP * CP * PP)
        expert weights:  rank = etp + ETP * (ep + EP * (expert_dp + EDP * pp)), EDP = world / (ETP * EP * PP)

    A layout may be impossible (that is what `check_layout` is for); properties that divide then round down.

    Args:
        world_size: ranks.
        tp: tensor parallel size (megatron: tensor_model_parallel_size).
        pp: pipeline stages.
        vpp: model chunks per stage (interleaved schedule); None: 1F1B.
        cp: context parallel size.
        ep: expert parallel size.
        etp: tensor parallel size inside experts; None: the same as tp.
        sequence_parallel: activations between the tensor-parallel blocks are split along the sequence.
    """

    world_size: int
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        if self.etp is None:
            object.__setattr__(self, "etp", self.tp)
        for name in ("world_size", "tp", "pp", "cp", "ep", "etp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @classmethod
    def resolve(cls, parallel: ParallelSection, world_size: int, is_moe: bool) -> ParallelLayout:
        """The layout that a job's `parallel` section means on this many ranks.

        Defaults: experts take the dense tensor-parallel size; sequence parallelism is on for MoE with tp > 1, as
        megatron-core demands, and off otherwise.
        """
        tp = parallel.tensor_model_parallel_size
        sequence_parallel = parallel.sequence_parallel
        if sequence_parallel is None:
            sequence_parallel = is_moe and tp > 1
        return cls(
            world_size=world_size,
            tp=tp,
            pp=parallel.pipeline_model_parallel_size,
            vpp=parallel.virtual_pipeline_model_parallel_size,
            cp=parallel.context_parallel_size,
            ep=parallel.expert_model_parallel_size,
            etp=parallel.expert_tensor_parallel_size,
            sequence_parallel=sequence_parallel,
        )

    @property
    def expert_tp(self) -> int:
        """`etp` after its default."""
        assert self.etp is not None
        return self.etp

    @property
    def dp(self) -> int:
        """Data-parallel replicas of the dense weights."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def expert_dp(self) -> int:
        """Data-parallel replicas of the expert weights."""
        return self.world_size // (self.expert_tp * self.ep * self.pp)

    def coordinates(self, rank: int) -> Coordinates:
        """The rank's place on every axis.

        Raises:
            ValueError: the rank is not in 0..world_size-1.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside a world of {self.world_size}")
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        rest, etp = divmod(rank, self.expert_tp)
        rest, ep = divmod(rest, self.ep)
        expert_pp, expert_dp = divmod(rest, self.expert_dp)
        assert pp == expert_pp, "the two grids share the pipeline axis"
        return Coordinates(tp=tp, cp=cp, dp=dp, pp=pp, ep=ep, etp=etp, expert_dp=expert_dp)

    def rank(self, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """The rank at these coordinates of the dense grid."""
        return tp + self.tp * (cp + self.cp * (dp + self.dp * pp))

    def groups(self, axis: Axis) -> tuple[tuple[int, ...], ...]:
        """The ranks that communicate along an axis: they differ in that coordinate only. Ordered as megatron-core's.

        "dp_cp" is the group over which dense gradients are reduced (dp and cp together).
        """
        grid = ("etp", "ep", "expert_dp", "pp") if axis in ("ep", "etp", "expert_dp") else ("tp", "cp", "dp", "pp")
        varying = ("dp", "cp") if axis == "dp_cp" else (axis,)
        fixed = [name for name in grid if name not in varying]
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            place = self.coordinates(rank)
            members.setdefault(tuple(getattr(place, name) for name in fixed), []).append(rank)
        return tuple(sorted(tuple(ranks) for ranks in members.values()))

    def replace(self, **changes: object) -> ParallelLayout:
        """A copy with some degrees changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def flags(self, instead_of: ParallelLayout | None = None) -> str:
        """The layout as command-line flags that can be pasted (the world size is not among them).

        Args:
            instead_of: the layout that these flags are to override; its settings are undone explicitly.
        """
        other = instead_of or ParallelLayout(world_size=self.world_size)
        parts = [f"--tp {self.tp}", f"--pp {self.pp}", f"--cp {self.cp}", f"--ep {self.ep}"]
        if self.vpp is not None or other.vpp is not None:
            vpp = "null" if self.vpp is None else self.vpp
            parts.append(f"--parallel.virtual_pipeline_model_parallel_size {vpp}")
        if self.expert_tp != self.tp or other.expert_tp != other.tp:
            parts.append(f"--parallel.expert_tensor_parallel_size {self.expert_tp}")
        if self.sequence_parallel or other.sequence_parallel:
            parts.append(f"--parallel.sequence_parallel {str(self.sequence_parallel).lower()}")
        return " ".join(parts)

    def summary(self) -> str:
        """The layout for people: every degree that is not 1, then data parallel, as in "tp4+sp pp4 vpp5 cp2 dp16"."""
        parts = [f"tp{self.tp}" + ("+sp" if self.sequence_parallel else "")] if self.tp > 1 else []
        parts += [f"pp{self.pp}"] if self.pp > 1 else []
        parts += [f"vpp{self.vpp}"] if self.vpp is not None else []
        parts += [f"cp{self.cp}"] if self.cp > 1 else []
        parts += [f"ep{self.ep}"] if self.ep > 1 else []
        parts += [f"etp{self.expert_tp}"] if self.expert_tp != self.tp else []
        return " ".join([*parts, f"dp{self.dp}"])
