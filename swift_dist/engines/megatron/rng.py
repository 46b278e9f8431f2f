"""Random generators: seeding that does not repeat itself over the ranks, and saving them for an exact resume."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

from swift_dist.parallel import ParallelLayout


def seed_generators(seed: int, layout: ParallelLayout, rank: int, step: int = 0) -> None:
    """Seed this rank's generators for dropout.

    Tensor-parallel ranks share the default stream (they hold the same activations) and megatron's tracker gives them
    different ones where they do not. Different data (dp, cp) and different layers (pp) get different streams.
    `step` keeps a run that resumes on another layout from repeating the dropout it began with.
    """
    place = layout.coordinates(rank)
    replica = place.cp + layout.cp * (place.dp + layout.dp * place.pp)
    # megatron adds up to some thousands for tensor and expert ranks; torch takes 64 bits, of which the low 32 matter.
    mixed = (seed * 1_000_003 + step * 7_919 + replica * 100_003) % (1 << 31)
    torch.manual_seed(mixed)
    model_parallel_cuda_manual_seed(mixed, force_reset_rng=True)


def save_generators() -> torch.Tensor:
    """The generators' states of all ranks, uint8 [world, bytes], the same on every rank. Collective."""
    device = torch.cuda.current_device()
    mine = torch.cat(_states()).to(device)
    everyone = torch.empty((dist.get_world_size(), mine.numel()), dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(everyone.view(-1), mine)  # flat: gloo takes no other shape
    return everyone.cpu()


def restore_generators(everyone: torch.Tensor) -> None:
    """Set this rank's generators from what `save_generators` returned on the same layout and kind of device."""
    states = _states()
    rows = everyone[dist.get_rank()].split([state.numel() for state in states])
    mine = [row.clone() for row in rows]  # torch reads a state as an aligned struct; an odd offset is a segfault
    torch.set_rng_state(mine[0])
    torch.cuda.set_rng_state(mine[1])
    tracker = get_cuda_rng_tracker()
    tracker.set_states(dict(zip(sorted(tracker.get_states()), mine[2:], strict=True)))


def fits(everyone: torch.Tensor) -> bool:
    """Whether the saved states have this world's size and this device's generators."""
    return tuple(everyone.shape) == (dist.get_world_size(), sum(state.numel() for state in _states()))


def _states() -> list[torch.Tensor]:
    """CPU generator, device generator, then the tracker's by name; uint8 on the CPU."""
    tracked: dict[str, Any] = get_cuda_rng_tracker().get_states()
    return [torch.get_rng_state(), torch.cuda.get_rng_state(), *(tracked[name] for name in sorted(tracked))]
