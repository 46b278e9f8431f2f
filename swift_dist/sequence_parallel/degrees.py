"""How many of a group's ranks exchange heads (Ulysses) and how many pass keys round (ring)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swift_dist.config.applies import key_that_packs
from swift_dist.config.job import JobConfig
from swift_dist.errors import JobError
from swift_dist.parallel import ParallelLayout
from swift_dist.sequence_parallel.limits import ring_refusal, row_refusal

SIZE, ULYSSES = "parallel.context_parallel_size", "parallel.ulysses_size"


@dataclass(frozen=True)
class Degrees:
    """A group of `ulysses` x `ring` consecutive ranks; rank i of it is Ulysses rank ``i % ulysses`` of ring rank
    ``i // ulysses``, so that Ulysses' groups are neighbours."""

    ulysses: int
    ring: int

    @property
    def size(self) -> int:
        return self.ulysses * self.ring


def fits_heads(ulysses: int, heads: int, kv_heads: int) -> bool:
    """Whether `ulysses` ranks can share the heads out: as many query heads each, and either as many key-value heads
    each or each of them on as many ranks."""
    return heads % ulysses == 0 and (kv_heads % ulysses == 0 or ulysses % kv_heads == 0)


def degrees_of(
    job: JobConfig, hf_config: Mapping[str, Any], ranks_per_node: int, reference: Mapping[str, Any] | None = None
) -> Degrees:
    """What a job means by `parallel.context_parallel_size`.

    Args:
        job: the job.
        hf_config: the model's config.json.
        ranks_per_node: see `choose`.
        reference: the config.json of `objective.reference`, whose attention is shared in the same way.

    Raises:
        JobError: see `choose`; or a model does not say how many heads it has, or cannot share its rows.
    """
    size = job.parallel.context_parallel_size
    if size == 1:
        return Degrees(1, 1)
    models = {"the model": hf_config, **({"objective.reference": reference} if reference else {})}
    texts = {whose: _text(config) for whose, config in models.items()}
    heads = [_heads(size, whose, text) for whose, text in texts.items()]
    reasons = [f"of {whose}, {reason}" for whose, text in texts.items() if (reason := ring_refusal(text))]
    return choose(size, heads, ranks_per_node, job.parallel.ulysses_size, reasons[0] if reasons else None)


def layout_of(
    job: JobConfig, hf_config: Mapping[str, Any], ranks_per_node: int, reference: Mapping[str, Any] | None = None
) -> ParallelLayout:
    """Groups of parallel.context_parallel_size ranks share their rows; the groups are the data-parallel replicas.

    Args:
        See `degrees_of`.

    Raises:
        JobError: the groups cannot be formed, or the model cannot do what the job wants of its rows.
    """
    ranks, size = job.cluster.nnodes * ranks_per_node, job.parallel.context_parallel_size
    if ranks % size:
        near = [number for number in range(1, ranks + 1) if ranks % number == 0]
        near.sort(key=lambda number: abs(number - size))
        raise JobError(
            SIZE, f"{size} does not divide the {ranks} ranks", f"one of {', '.join(map(str, sorted(near[:3])))}"
        )
    if size > 1:
        degrees_of(job, hf_config, ranks_per_node, reference)
        refused = {
            "train.compile": job.train.compile,
            "data.padding_free": job.data.padding_free is False,
            "tuner.name": "neftune" in job.tuner.name,
        }
        for key, is_set in refused.items():
            if is_set:
                raise JobError(key, f"cannot be combined with {SIZE} {size}", "leave one of them out")
    packs, reason = key_that_packs(job), row_refusal(_text(hf_config))
    if packs and reason:
        raise JobError(packs, f"sequences of a row cannot be kept apart: {reason}", f"leave out {packs}")
    return ParallelLayout(world_size=ranks, cp=size)


def _text(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    text: Mapping[str, Any] = hf_config.get("text_config") or hf_config
    return text


def _heads(size: int, whose: str, text: Mapping[str, Any]) -> tuple[int, int]:
    reason = row_refusal(text)
    if reason:
        raise JobError(SIZE, f"{size}, and the rows of {whose} cannot be shared: {reason}", "leave it out")
    heads = text.get("num_attention_heads") or text.get("n_head")
    if not isinstance(heads, int):
        raise JobError(SIZE, f"{size}, and the config.json of {whose} states no num_attention_heads", "leave it out")
    return heads, text.get("num_key_value_heads") or heads


def choose(
    size: int,
    heads: Sequence[tuple[int, int]],
    ranks_per_node: int,
    ulysses: int | None = None,
    no_ring: str | None = None,
) -> Degrees:
    """The largest Ulysses degree that the heads allow and that stays inside a node; the rest is a ring.

    Ulysses moves each token's heads twice a layer, whatever N is, and its kernels see whole sequences; a ring passes
    all keys and values N - 1 times, but hides it behind computing and needs no bandwidth beyond a neighbour's. So
    Ulysses goes where links are fast, the ring where they are not (USP, arXiv 2405.07719).

    Args:
        size: ranks of the group, N.
        heads: (query heads, key-value heads) of each kind of attention layer of the model.
        ranks_per_node: consecutive ranks that share a machine.
        ulysses: the degree, where the job names it.
        no_ring: why the model's attention cannot go round a ring; None: it can.

    Raises:
        JobError: a degree that the job names does not divide the group, or cannot share out the heads; or it takes a
            ring where there cannot be one.
    """
    within = [u for u in range(1, size + 1) if size % u == 0 and all(fits_heads(u, *pair) for pair in heads)]
    words = ", ".join(f"{query} query and {kv} key-value heads" for query, kv in sorted(set(heads)))
    if no_ring is not None:
        return _without_ring(size, heads, ulysses, f"{no_ring}, which cannot go round a ring", words)
    if ulysses is not None:
        if ulysses not in within:
            raise JobError(
                ULYSSES,
                f"{ulysses} does not divide a group of {size} ranks whose attention has {words}",
                f"one of {', '.join(map(str, within))}",
            )
        return Degrees(ulysses, size // ulysses)
    inside = [u for u in within if ranks_per_node % u == 0]
    return Degrees(max(inside), size // max(inside))


def _without_ring(size: int, heads: Sequence[tuple[int, int]], ulysses: int | None, reason: str, words: str) -> Degrees:
    fitting = [u for u in range(1, max(query for query, _ in heads) + 1) if all(fits_heads(u, *pair) for pair in heads)]
    if size not in fitting:
        near = sorted(sorted(fitting, key=lambda u: abs(u - size))[:3])
        raise JobError(
            SIZE, f"{size} ranks cannot share out {words} alone: {reason}", f"one of {', '.join(map(str, near))}"
        )
    if ulysses not in (None, size):
        raise JobError(ULYSSES, f"{ulysses} of {size} ranks leaves a ring: {reason}", f"leave it out, or {size}")
    return Degrees(size, 1)
