"""The engine's state as megatron-core's distributed checkpoint wants it, and back."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from swift_dist.checkpoint.loading import FP8_SCALES
from swift_dist.converters.live import LiveChunk, Shard, load_hf_slices
from swift_dist.engines.megatron import optimizer_shards, rng
from swift_dist.engines.megatron.model import unwrap
from swift_dist.engines.megatron.optimizer import counts_for_each_parameter, parts, set_update_count
from swift_dist.runs.guard import GuardHistory

if TYPE_CHECKING:
    from swift_dist.engines.megatron.engine import MegatronEngine


def collect(engine: MegatronEngine, is_loading: bool) -> dict[str, Any]:
    """See `MegatronEngine.sharded_state_dict`."""
    metadata = engine._metadata()
    names = chunk_names(len(engine.chunks))
    state: dict[str, Any] = {
        name: _model_state(unwrap(chunk).sharded_state_dict(metadata=metadata), fp8=bool(engine.config.fp8))
        for name, chunk in zip(names, engine.chunks, strict=True)
    }
    # What is not there cannot be saved, nor asked for; while loading the numbers themselves are overwritten.
    set_update_count(engine.optimizer, engine.updates)
    if engine.job.parallel.use_distributed_optimizer:
        state["optimizer"] = optimizer_shards.shards(parts(engine.optimizer), state, is_loading)
    else:
        state["optimizer"] = engine.optimizer.sharded_state_dict(state, is_loading, metadata=metadata)
        _keep_tensors_only(state["optimizer"], counts_for_each_parameter(engine.optimizer))
    state["engine"] = {
        "steps": engine.steps,
        "updates": engine.updates,
        "layout": asdict(engine.layout),
        "device": engine.device.type,
        "guard": engine.history.to_dict(),
        "loss_scaler": engine._scaler.state_dict() if engine._scaler is not None else None,
    }
    if not is_loading:
        state["rng"] = rng.save_generators()
    return state


def _model_state(state: dict[str, Any], fp8: bool) -> dict[str, Any]:
    """A chunk's state without transformer-engine's scaling factors where there are none: only its classes have such
    entries, and a checkpoint written with them is to load where they are not, and the other way round."""
    return state if fp8 else {key: value for key, value in state.items() if FP8_SCALES not in key}


def _load_model(model: torch.nn.Module, state: dict[str, Any]) -> None:
    """Load a chunk's weights; every one of them must be there. Raises RuntimeError otherwise."""
    misfit = model.load_state_dict(state, strict=False)
    missing = [key for key in misfit.missing_keys if FP8_SCALES not in key]
    if missing or misfit.unexpected_keys:
        raise RuntimeError(f"the checkpoint lacks {missing} and has {misfit.unexpected_keys} beyond the model")


def _load_optimizer(engine: MegatronEngine, state: dict[str, Any]) -> None:
    """Masters and moments, after the weights: where both are one, the master is the exact one."""
    if not engine.job.parallel.use_distributed_optimizer:
        engine.optimizer.load_state_dict(state)
        return
    weights = {
        name: unwrap(chunk).sharded_state_dict(metadata=engine._metadata())
        for name, chunk in zip(chunk_names(len(engine.chunks)), engine.chunks, strict=True)
    }
    for name, shard in optimizer_shards.shards(parts(engine.optimizer), weights).items():
        shard.data.copy_(state[name])


def _keep_tensors_only(optimizer: dict[str, Any], counts_for_each_parameter: bool) -> None:
    """Keep everything but moments and masters out of the file.

    Parameter groups hold settings, which come from the job; the number of updates and the loss scale are among the
    engine's numbers. How many optimizers megatron chains (one, or dense and experts apart) depends on the layout, so
    what each of them adds for itself would not fit a resume on another one.
    """
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject

    single = not all(isinstance(key, int) for key in optimizer)
    for part in [optimizer] if single else optimizer.values():
        part.pop("grad_scaler", None)
        for holder in (part, part.get("optimizer", {})):  # fp32 has groups at the top; the others keep theirs inside
            if "param_groups" in holder:
                groups = [_unwrapped(group) for group in holder["param_groups"]]
                holder["param_groups"] = LocalNonpersistentObject(groups)
            if counts_for_each_parameter and "state" in holder:  # AdamW wants one while loading; set afterwards
                holder["state"]["common_step"] = LocalNonpersistentObject(torch.zeros(()))


def _unwrapped(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group whose list of parameters megatron has marked as not to be saved, without the mark."""
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject

    parameters = group.get("params")
    return {**group, "params": parameters.unwrap()} if isinstance(parameters, LocalNonpersistentObject) else group


def restore(engine: MegatronEngine, loaded: dict[str, Any]) -> None:
    """See `MegatronEngine.load_state_dict`."""
    for name, chunk in zip(chunk_names(len(engine.chunks)), engine.chunks, strict=True):
        _load_model(unwrap(chunk), loaded[name])
    _load_optimizer(engine, loaded.get("optimizer", {}))  # a rank may own no part of any parameter
    numbers = loaded["engine"]
    engine.updates, engine.steps = numbers["updates"], numbers["steps"]
    engine.history = GuardHistory.from_dict(numbers["guard"])
    set_update_count(engine.optimizer, engine.updates)
    if engine._scaler is not None and numbers["loss_scaler"] is not None:
        engine._scaler.load_state_dict(numbers["loss_scaler"])
    same = numbers["layout"] == asdict(engine.layout) and numbers["device"] == engine.device.type
    if same and rng.fits(loaded["rng"]):
        rng.restore_generators(loaded["rng"])
    else:  # other ranks, other streams: start new ones, the same for everyone who resumes here
        rng.seed_generators(engine.job.train.seed, engine.layout, engine.rank, engine.steps)
    engine._params_stale = False


def chunk_names(count: int) -> list[str]:
    """The names that megatron's optimizer expects for a stage's chunks."""
    return ["model"] if count == 1 else [f"model{index}" for index in range(count)]


def load_pretrained(engine: MegatronEngine, folder: Path) -> None:
    """See `MegatronEngine.load_pretrained`."""
    from megatron.core import parallel_state

    live = []
    for chunk in engine.chunks:
        model = unwrap(chunk)
        offset = model.decoder.layers[0].layer_number - 1 if len(model.decoder.layers) else 0
        live.append(LiveChunk(dict(model.named_parameters()), offset))
    ep_size, num_experts = engine.layout.ep, engine.config.num_moe_experts or 0
    shard = Shard(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=engine.layout.tp,
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        etp_size=engine.layout.expert_tp,
        expert_offset=parallel_state.get_expert_model_parallel_rank() * (num_experts // ep_size),
    )
    load_hf_slices(live, folder, engine.family.rows(engine.hf_config), shard)
    engine.optimizer.reload_model_params()
