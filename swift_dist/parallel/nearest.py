"""What to do about an impossible layout: the valid ones nearest to it, and the error that names them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import log2

from swift_dist.errors import JobError
from swift_dist.parallel.layout import ParallelLayout
from swift_dist.parallel.rules import Batch, broken_rules, divisors
from swift_dist.parallel.shape import ModelShape

WORLD_SIZE_SEARCH = 2  # other world sizes are searched up to this factor away


def distance(wanted: ParallelLayout, other: ParallelLayout) -> float:
    """How far apart two layouts are, in halvings and doublings.

    The sum over tp, pp, cp, ep of |log2(ratio)|, and over etp unless it simply follows tp in both; twice that of the
    world size (ranks cannot be made up); 1/2 for another number of virtual stages; 1/4 for sequence parallelism
    switched.
    """
    degrees = ["tp", "pp", "cp", "ep"]
    if wanted.expert_tp != wanted.tp or other.expert_tp != other.tp:
        degrees.append("expert_tp")
    total = sum(abs(log2(getattr(other, name) / getattr(wanted, name))) for name in degrees)
    total += 2 * abs(log2(other.world_size / wanted.world_size))
    total += 0.5 * (wanted.vpp != other.vpp) + 0.25 * (wanted.sequence_parallel != other.sequence_parallel)
    return total


def nearest_layouts(
    layout: ParallelLayout,
    shape: ModelShape,
    *,
    sequence_length: int,
    micro_batch_size: int,
    global_batch_size: int,
    fp8: bool = False,
    count: int = 3,
) -> list[ParallelLayout]:
    """Up to `count` valid layouts, nearest first by `distance` (ties: less tp, then less pp).

    Those of the same world size come first. Where there are fewer than `count` of them, the nearest world sizes, down
    to half and up to twice the ranks, fill the list. Batch and sequence length are taken as given.
    """

    batch = Batch(sequence_length, micro_batch_size, global_batch_size, fp8)
    return _nearest(layout, shape, batch, count)


def _nearest(layout: ParallelLayout, shape: ModelShape, batch: Batch, count: int) -> list[ParallelLayout]:
    def valid(world_size: int) -> list[ParallelLayout]:
        found = [c for c in _candidates(layout, world_size, shape) if not broken_rules(c, shape, batch)]
        return sorted(found, key=lambda c: (distance(layout, c), c.tp, c.pp, c.cp, c.ep))[:count]

    result = valid(layout.world_size)
    if len(result) >= count:
        return result
    low, high = max(1, layout.world_size // WORLD_SIZE_SEARCH), layout.world_size * WORLD_SIZE_SEARCH
    others = sorted(range(low, high + 1), key=lambda n: (abs(log2(n / layout.world_size)), n))
    elsewhere: list[ParallelLayout] = []
    for world_size in others[1:]:
        # a world size costs this distance by itself; once `count` nearer ones are known, farther sizes cannot help
        cost = 2 * abs(log2(world_size / layout.world_size))
        if len(elsewhere) >= count and distance(layout, elsewhere[count - 1]) <= cost:
            break
        elsewhere = sorted([*elsewhere, *valid(world_size)], key=lambda c: (distance(layout, c), c.world_size))
    return (result + elsewhere)[:count]


def _candidates(wanted: ParallelLayout, world_size: int, shape: ModelShape) -> Iterator[ParallelLayout]:
    """Layouts of a world size that could be valid: degrees divide it, and what else is cheap to know beforehand."""
    virtual = {None, wanted.vpp, *(d for d in divisors(shape.num_layers) if 1 < d <= (wanted.vpp or 1))}
    sizes = divisors(world_size)
    for pp in (d for d in sizes if shape.num_layers % d == 0):
        ranks = world_size // pp
        for tp in (d for d in divisors(ranks) if shape.num_attention_heads % d == 0):
            sequence_parallel = tp > 1 and (wanted.sequence_parallel or shape.is_moe)
            for cp in divisors(ranks // tp):
                for ep, etp in _expert_degrees(wanted, shape, ranks, tp):
                    for vpp in virtual if pp > 1 else {None}:
                        yield ParallelLayout(
                            world_size=world_size,
                            tp=tp,
                            pp=pp,
                            vpp=vpp,
                            cp=cp,
                            ep=ep,
                            etp=etp,
                            sequence_parallel=sequence_parallel,
                        )


def _expert_degrees(
    wanted: ParallelLayout, shape: ModelShape, ranks_per_stage: int, tp: int
) -> Iterator[tuple[int, int]]:
    if shape.num_experts is None:
        yield 1, tp
        return
    for etp in sorted({1, tp, wanted.expert_tp}):
        if ranks_per_stage % etp == 0:
            yield from ((ep, etp) for ep in divisors(ranks_per_stage // etp) if shape.num_experts % ep == 0)


def require_valid(
    layout: ParallelLayout,
    shape: ModelShape,
    *,
    sequence_length: int,
    micro_batch_size: int,
    global_batch_size: int,
    fp8: bool = False,
) -> None:
    """Refuse an impossible layout before anything starts.

    Raises:
        JobError: the first broken rule's key, all broken rules, and up to three nearest layouts as flags to paste.
    """
    batch = Batch(sequence_length, micro_batch_size, global_batch_size, fp8)
    violations = broken_rules(layout, shape, batch)
    if not violations:
        return
    first, rest = violations[0], violations[1:]
    message = f"{first.message} [rule {first.rule}]"
    for violation in rest:
        message += f"\n  also {violation.key}: {violation.message} [rule {violation.rule}]"
    raise JobError(first.key, message, _remedy(layout, shape, batch))


def _remedy(layout: ParallelLayout, shape: ModelShape, batch: Batch) -> str:
    near = _nearest(layout, shape, batch, count=3)
    if near:
        lines = [
            f"    {n.flags(layout)}" + (f"  (on {n.world_size} ranks)" if n.world_size != layout.world_size else "")
            for n in near
        ]
        return f"layouts that work, nearest first ({layout.world_size} ranks unless noted):\n" + "\n".join(lines)
    alone = replace(layout, tp=1, pp=1, vpp=None, cp=1, ep=1, etp=1, sequence_parallel=False)
    causes = sorted({violation.key for violation in broken_rules(alone, shape, batch)})
    return f"no layout near {layout.world_size} ranks fits; change {' and '.join(causes)}"
