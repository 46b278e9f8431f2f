"""What ranks do in the engine tests (run by `gang.Gang`)."""

from __future__ import annotations

import copy
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))

import golden_cases as cases
import torch

from swift_dist.config import JobConfig
from swift_dist.engines import build_engine
from swift_dist.errors import RunError


def make(worker: Any, job: dict[str, Any]) -> Any:
    return build_engine(JobConfig.model_validate(job), job["model"]["config"], worker)


def step(engine: Any, number: int) -> Any:
    whole = cases.batch(number, engine.hf_config["vocab_size"])
    size = engine.job.train.micro_batch_size
    mine = cases.share(whole, engine.data.dp_rank, engine.data.dp_size, size) if engine.data.needs_data else []
    return engine.train_step(mine, number)


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """This rank's parameters by name."""
    from swift_dist.engines.megatron.model import unwrap

    engine._gather_params()
    return {
        f"{index}.{name}": parameter.detach().clone()
        for index, chunk in enumerate(engine.chunks)
        for name, parameter in unwrap(chunk).named_parameters()
    }


def losses(worker: Any, job: dict[str, Any], steps: int) -> list[tuple[float, float]]:
    engine = make(worker, job)
    try:
        return [(r.loss, r.grad_norm) for r in (step(engine, number) for number in range(steps))]
    finally:
        engine.close()


def train_and_save(worker: Any, job: dict[str, Any], folder: str, saved_at: int, steps: int) -> list[Any]:
    """Train `steps` steps, saving after `saved_at`; losses and norms of the steps after it."""
    from megatron.core import dist_checkpointing

    engine = make(worker, job)
    try:
        numbers = []
        for number in range(steps):
            if number == saved_at:
                dist_checkpointing.save(engine.sharded_state_dict(), folder, validate_access_integrity=False)
            result = step(engine, number)
            numbers.append((result.loss, result.grad_norm))
        return numbers[saved_at:]
    finally:
        engine.close()


def load_and_train(worker: Any, job: dict[str, Any], folder: str, saved_at: int, steps: int) -> list[Any]:
    from megatron.core import dist_checkpointing

    engine = make(worker, job)
    try:
        request = engine.sharded_state_dict(is_loading=True)
        engine.load_state_dict(dist_checkpointing.load(request, folder, validate_access_integrity=False))
        assert engine.steps == saved_at
        results = [step(engine, number) for number in range(saved_at, steps)]
        return [(result.loss, result.grad_norm) for result in results]
    finally:
        engine.close()


def with_group_adam(worker: Any, what: str, **arguments: Any) -> Any:
    """Another function of this file, with an Adam that counts in its parameter groups (see group_adam.py)."""
    import group_adam

    group_adam.use()
    return globals()[what](worker, **arguments)


def loss_scale_after_load(worker: Any, job: dict[str, Any], folder: str) -> float:
    from megatron.core import dist_checkpointing

    engine = make(worker, job)
    try:
        request = engine.sharded_state_dict(is_loading=True)
        engine.load_state_dict(dist_checkpointing.load(request, folder, validate_access_integrity=False))
        return engine._scaler.scale.item()
    finally:
        engine.close()


def evaluate_after(worker: Any, job: dict[str, Any], steps: int) -> tuple[float, float]:
    """(evaluation of batch `steps` after as many steps, the loss of training on it): equal without dropout."""
    engine = make(worker, job)
    try:
        for number in range(steps):
            step(engine, number)
        whole = cases.batch(steps, engine.hf_config["vocab_size"])
        mine = cases.share(whole, engine.data.dp_rank, engine.data.dp_size) if engine.data.needs_data else []
        evaluated = engine.evaluate([mine]).loss
        return evaluated, step(engine, steps).loss
    finally:
        engine.close()


def poisoned(worker: Any, job: dict[str, Any], at: int, steps: int) -> dict[str, Any]:
    """Train with a NaN among the last rank's activations at one step."""
    from swift_dist.engines.megatron.model import unwrap

    engine = make(worker, job)
    try:
        results, before, after = [], {}, {}
        for number in range(steps):
            if number != at:
                results.append(step(engine, number))
                continue
            before = weights(engine)
            if worker.rank == worker.world_size - 1:
                decoder = unwrap(engine.chunks[-1]).decoder
                hook = decoder.register_forward_hook(lambda module, inputs, output: output * math.nan)
            try:
                results.append(step(engine, number))
            except RunError as error:
                return {"stopped": str(error)}
            if worker.rank == worker.world_size - 1:
                hook.remove()
            after = weights(engine)
        unchanged = all(torch.equal(before[name], after[name]) for name in before)
        return {"results": results, "unchanged": unchanged}
    finally:
        engine.close()


def fp16_scales(worker: Any, job: dict[str, Any], steps: int) -> list[tuple[bool, str, float]]:
    engine = make(worker, job)
    try:
        found = []
        for number in range(steps):
            result = step(engine, number)
            found.append((result.skipped, result.reason, engine._scaler.scale.item()))
        return found
    finally:
        engine.close()


def lose_a_peer(worker: Any, job: dict[str, Any], smaller: dict[str, Any]) -> dict[str, Any]:
    """The last rank dies in the middle of training; the others leave and build a smaller gang in the same process."""
    engine = make(worker, job)
    step(engine, 0)
    if worker.rank == worker.world_size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        for number in range(1, 100):
            step(engine, number)
    except RuntimeError as error:
        noticed, message = time.monotonic() - began, str(error)
    else:
        raise AssertionError("nobody noticed")
    began = time.monotonic()
    engine.close()
    closed = time.monotonic() - began
    again = copy.copy(worker)
    again.attempt, again.world_size = 1, worker.world_size - 1
    if again.rank >= smaller["ranks"]:
        return {}
    again.world_size = smaller["ranks"]
    numbers = losses(again, smaller["job"], 2)
    return {"noticed": noticed, "closed": closed, "message": message, "numbers": numbers}


def rebuild(worker: Any, jobs: list[dict[str, Any]]) -> list[Any]:
    """Several engines one after the other in one process."""
    found = []
    for attempt, job in enumerate(jobs):
        worker.attempt = attempt
        found.append(losses(worker, job, 2))
    return found


def cp_comm_type(worker: Any, job: dict[str, Any]) -> str | None:
    """How transformer-engine's attention would talk, on a GPU that had it and two context-parallel ranks."""
    from swift_dist.engines.megatron import settings
    from swift_dist.models import find_family

    settings.have_transformer_engine = lambda: True
    settings._fusions = lambda on_cuda, te: {}  # megatron looks for them in transformer-engine itself
    config = job["model"]["config"]
    layout = cases.layout("CP2")
    return settings.transformer_config(
        JobConfig.model_validate(job), layout, find_family(config), config, "cuda:0"
    ).cp_comm_type


def parameter_names(worker: Any, job: dict[str, Any]) -> list[str]:
    engine = make(worker, job)
    try:
        return [name.removeprefix("0.") for name in weights(engine)]
    finally:
        engine.close()


def global_weights(worker: Any, job: dict[str, Any]) -> dict[str, float]:
    """A fingerprint of every global tensor's part on this rank: its global offset and first number."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    engine = make(worker, job)
    try:
        found = {}
        from swift_dist.engines.megatron.model import unwrap

        for chunk in engine.chunks:
            state = unwrap(chunk).sharded_state_dict(metadata=engine._metadata())
            apply_factories(state)
            for part in nested_values(state):
                if isinstance(part, ShardedTensor):
                    corner = tuple(offset + 0 for offset in part.global_offset)
                    found[f"{part.key}{list(corner)}"] = float(part.data.detach().flatten()[0])
        return found
    finally:
        engine.close()


def optimizer_boxes(worker: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Every box of optimizer state that this rank would save, and how many numbers its optimizer updates."""
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    from swift_dist.engines.megatron.optimizer import parts

    engine = make(worker, job)
    try:
        found = engine.sharded_state_dict()["optimizer"].values()
        params = [
            p for part in parts(engine.optimizer) for group in part.optimizer.param_groups for p in group["params"]
        ]
        return {
            "boxes": [
                (b.key, b.global_shape, b.global_offset, b.local_shape, is_main_replica(b.replica_id)) for b in found
            ],
            "held": sum(b.data.numel() for b in found if b.key.startswith("optimizer.state.exp_avg.")),
            "owned": sum(parameter.numel() for parameter in params),
        }
    finally:
        engine.close()


def masters_before_and_after(worker: Any, jobs: list[dict[str, Any]], folder: str) -> bool:
    """Whether the second job loads exactly the fp32 masters and moments that the first one saved."""
    from megatron.core import dist_checkpointing

    def state(engine: Any) -> dict[str, torch.Tensor]:
        found = engine.sharded_state_dict()["optimizer"]
        return {name: shard.data.clone() for name, shard in found.items()}

    states = []
    for attempt, job in enumerate(jobs):
        worker.attempt = attempt
        engine = make(worker, job)
        try:
            if attempt == 0:
                for number in range(2):
                    step(engine, number)
                dist_checkpointing.save(engine.sharded_state_dict(), folder, validate_access_integrity=False)
            else:
                request = engine.sharded_state_dict(is_loading=True)
                engine.load_state_dict(dist_checkpointing.load(request, folder, validate_access_integrity=False))
            states.append(state(engine))
        finally:
            engine.close()
    first, second = states
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
