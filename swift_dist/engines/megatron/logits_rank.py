"""What the processes of a comparison of logits do (`logits.py` starts them): transformers' model, or one Megatron rank.

The rank builds the engine's model without anything that trains it, fills it through megatron-core's own load, and runs
megatron-core's own schedule over the prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from swift_dist.checkpoint.loading import FP8_SCALES, SafeFileSystemReader
from swift_dist.checkpoint.trusted import safe_types
from swift_dist.config import JobConfig
from swift_dist.engines.megatron import groups, model, rng, settings, state
from swift_dist.errors import RunError
from swift_dist.models import find_family
from swift_dist.parallel import ParallelLayout

if TYPE_CHECKING:
    from swift_dist.engines.megatron.engine import MegatronEngine

_SHOWN = 5  # names in one message


@dataclass
class Place:
    """One rank of one layout; a `swift_dist.runs.worker.Worker`. The ranks meet through a file in `run_dir`."""

    rank: int
    world_size: int
    run_dir: Path
    device: str = "cpu"
    node_rank: int = 0
    attempt: int = 0

    def __post_init__(self) -> None:
        self.local_rank, self.local_world_size = self.rank, self.world_size

    def store(self) -> dist.Store:
        return dist.FileStore(str(self.run_dir / "store"), self.world_size)

    def beat(self, phase: str, step: int) -> None: ...

    def stop_requested(self) -> bool:
        return False


def compare(
    place: Place,
    job: JobConfig,
    layout: ParallelLayout,
    hf_config: dict[str, Any],
    checkpoint: Path | None,
    prompts: list[list[int]],
    reference: Path,
    timeout: float,
    rounded: str | None = None,
) -> dict[str, Any] | None:
    """One rank's part of a layout. Collective over the layout's ranks.

    Args:
        job: of the model's folder, with this layout, in fp32; its sequence length and global batch size (for one
            data-parallel rank) are what the prompts are padded to.
        checkpoint: torch_dist folder; None: read the weights from the model's folder, as a training run would.
        reference: file with the reference logits of each prompt, [length, vocabulary].
        timeout: seconds for the ranks to meet.
        rounded: round the weights to this torch dtype; computed is in fp32 all the same.

    Returns:
        ``max_difference`` and ``same_argmax`` over all prompts; None on ranks that have no logits.

    Raises:
        RunError: the checkpoint is not that of the model, or its logits are no numbers.
    """
    built = build(place, job, layout, hf_config, timeout)
    if checkpoint is None:
        state.load_pretrained(built, Path(cast(str, job.model.path)))
    else:
        load(built, checkpoint)
    if rounded is not None:
        _round(built, getattr(torch, rounded))
    found = logits(built, prompts, job.data.sequence_length, job.train.global_batch_size)
    if not found:
        return None
    return _difference(found, torch.load(reference, weights_only=True))


@torch.no_grad()
def _round(built: MegatronEngine, dtype: torch.dtype) -> None:
    for chunk in built.chunks:
        for parameter in chunk.parameters():
            parameter.copy_(parameter.to(dtype))


@torch.no_grad()
def build(
    place: Place, job: JobConfig, layout: ParallelLayout, hf_config: dict[str, Any], timeout: float
) -> MegatronEngine:
    """This rank's part of the engine's model, without DDP, gradients and optimizer; every weight is NaN.

    What nobody fills in shows in every logit. The result has those attributes of an engine that `state` reads.
    """
    logging.getLogger("megatron.core").setLevel(logging.WARNING)  # it logs the name of every parameter
    family = find_family(hf_config)
    groups.join(layout, place, timeout)
    rng.seed_generators(job.train.seed, layout, place.rank)
    config = settings.transformer_config(job, layout, family, hf_config, place.device)
    chunks = model._models(config, layout, family, hf_config)
    for chunk in chunks:
        chunk.eval()
        for parameter in chunk.parameters():
            parameter.fill_(torch.nan)
    optimizer = SimpleNamespace(reload_model_params=lambda: None)
    built = SimpleNamespace(
        chunks=chunks, layout=layout, config=config, family=family, hf_config=hf_config, optimizer=optimizer
    )
    return cast("MegatronEngine", built)


def request(built: MegatronEngine) -> dict[str, Any]:
    """The weights as `megatron.core.dist_checkpointing` wants them, under the engine's keys."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": group}
    return {
        name: state._model_state(model.unwrap(chunk).sharded_state_dict(metadata=metadata), fp8=False)
        for name, chunk in zip(state.chunk_names(len(built.chunks)), built.chunks, strict=True)
    }


def load(built: MegatronEngine, folder: Path) -> None:
    """Fill the weights by megatron-core's own load. Collective.

    Raises:
        RunError: the checkpoint lacks weights of the model, or holds others besides (optimizer and the like may be
            there).
    """
    SafeFileSystemReader(folder).read_metadata()  # megatron unpickles the index freely: refuse a dangerous one first
    asked = request(built)
    with torch.serialization.safe_globals(safe_types()):
        loaded, unused, absent = dist_checkpointing.load(asked, str(folder), strict=StrictHandling.RETURN_ALL)
    if absent:
        raise RunError(f"{folder} lacks weights of the model: {_some(absent)}")
    unused = {key for key in unused if key.startswith(("decoder.", "embedding.", "output_layer.", "mtp."))}
    unused = {key for key in unused if FP8_SCALES not in key}
    if unused:
        raise RunError(f"{folder} holds weights that the model has not: {_some(unused)}")
    for name, chunk in zip(state.chunk_names(len(built.chunks)), built.chunks, strict=True):
        state._load_model(model.unwrap(chunk), loaded[name])


def _some(keys: set[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(sorted(keys)[:_SHOWN]) + more


@torch.no_grad()
def logits(built: MegatronEngine, prompts: list[list[int]], length: int, count: int) -> list[torch.Tensor]:
    """Each prompt's logits [prompt length, vocabulary], on the ranks of the last pipeline stage; [] on the others.

    Args:
        length: tokens that each prompt is padded to, on the right: attention is causal, so nothing sees the padding.
        count: micro-batches of one prompt each; the last prompt is repeated to fill them.
    """
    batches = [torch.tensor([[*prompt, *[0] * (length - len(prompt))]]) for prompt in prompts]
    batches += [batches[-1]] * (count - len(batches))
    iterators = [iter(batches) for _ in built.chunks]
    models: list[Any] = list(built.chunks)
    outputs = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=models if len(models) > 1 else models[0],
        num_microbatches=count,
        seq_length=length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    vocabulary = built.family.shape(built.hf_config).vocab_size
    return [
        output[0, : len(prompt), :vocabulary].float() for output, prompt in zip(outputs, prompts, strict=False)
    ]  # not strict: outputs of repeated prompts, or none at all


def _forward(batches: Iterator[torch.Tensor], chunk: Any) -> tuple[torch.Tensor, Any]:
    tokens = next(batches)
    positions = torch.arange(tokens.shape[1])[None]
    return chunk(tokens, positions, None), _whole_vocabulary


def _whole_vocabulary(output: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
    """[b, s, v/tp] -> [b, s, v] on every tensor-parallel rank."""
    return gather_from_tensor_model_parallel_region(output)


def _difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> dict[str, Any]:
    if not all(bool(torch.isfinite(mine).all()) for mine in found):
        raise RunError("the logits are not finite: a weight is not, or the checkpoint did not fill one")
    if not all(bool(torch.isfinite(theirs).all()) for theirs in expected):
        raise RunError("the reference logits are not finite")  # max() of floats would pass over a NaN
    pairs = list(zip(found, expected, strict=True))
    return {
        "max_difference": max(float((mine - theirs).abs().max()) for mine, theirs in pairs),
        "same_argmax": all(torch.equal(mine.argmax(-1), theirs.argmax(-1)) for mine, theirs in pairs),
    }
