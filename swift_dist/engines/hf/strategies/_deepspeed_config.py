"""DeepSpeed's configuration for a job: presets by name, or a JSON file of the user's own. Needs no torch.

A file's values win wherever the job leaves the choice to DeepSpeed (stage, offload, buckets); ``"auto"`` is filled in
as Hugging Face's integration does. What the job decides itself (batch sizes, clipping, precision, the update rule) must
agree with it. DeepSpeed passes over keys that it does not know, so every key is checked here against those that are
known to do what they say under this strategy.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from swift_dist.config import JobConfig
from swift_dist.errors import JobError

KEY = "strategy.deepspeed"
AUTO = "auto"

_OFFLOAD_OPTIMIZER = {"offload_optimizer": {"device": "cpu", "pin_memory": AUTO}}
_OFFLOAD = {**_OFFLOAD_OPTIMIZER, "offload_param": {"device": "cpu", "pin_memory": AUTO}}
_NVME = {
    "offload_optimizer": {"device": "nvme", "nvme_path": AUTO, "pin_memory": AUTO},
    "offload_param": {"device": "nvme", "nvme_path": AUTO, "pin_memory": AUTO},
}
_STAGE_2 = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": AUTO}
_STAGE_3 = {
    "stage": 3,
    "overlap_comm": True,
    "reduce_bucket_size": AUTO,
    "stage3_prefetch_bucket_size": AUTO,
    "stage3_param_persistence_threshold": AUTO,
}

PRESETS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "zero0": {"stage": 0},
        "zero1": {"stage": 1, "reduce_bucket_size": AUTO},
        "zero2": _STAGE_2,
        "zero3": _STAGE_3,
        "zero2_offload": {**_STAGE_2, **_OFFLOAD_OPTIMIZER},
        "zero3_offload": {**_STAGE_3, **_OFFLOAD},
        "zero3_nvme": {**_STAGE_3, **_NVME},
    }
)
"""Name -> ``zero_optimization``."""

TOP_KEYS = frozenset(
    "zero_optimization fp16 bf16 data_types communication_data_type aio train_batch_size "
    "train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping zero_allow_untested_optimizer "
    "zero_force_ds_cpu_optimizer steps_per_print wall_clock_breakdown memory_breakdown".split()
)
ZERO_KEYS = frozenset(
    "stage overlap_comm contiguous_gradients reduce_scatter reduce_bucket_size allgather_bucket_size "
    "allgather_partitions "
    "use_multi_rank_bucket_allreduce sub_group_size ignore_unused_parameters memory_efficient_linear "
    "log_trace_cache_warnings enable_sanity_checks round_robin_gradients offload_optimizer offload_param "
    "stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold "
    "stage3_max_live_parameters stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save "
    "stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential".split()
)
SECTION_KEYS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "zero_optimization.offload_optimizer": frozenset(
            "device nvme_path pin_memory buffer_count pipeline_read pipeline_write fast_init".split()
        ),
        "zero_optimization.offload_param": frozenset(
            "device nvme_path pin_memory buffer_count buffer_size max_in_cpu".split()
        ),
        "fp16": frozenset(
            "enabled loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis "
            "min_loss_scale".split()
        ),
        "bf16": frozenset(("enabled", "immediate_grad_update")),
        "data_types": frozenset(("grad_accum_dtype",)),
    }
)

_LOSS_SCALE = {
    "loss_scale": 0,  # dynamic
    "loss_scale_window": 2000,
    "hysteresis": 1,
    "consecutive_hysteresis": False,
    "min_loss_scale": 1,
}

_REFUSED = {
    "optimizer": ("the job's own update rule is used", "leave out the block and set optimizer.name, optimizer.lr, ..."),
    "scheduler": ("the job's own schedule is used", "leave out the block and set schedule.name, schedule.warmup_steps"),
    "amp": ("NVIDIA apex is not used", "set train.precision: bf16"),
    "tensor_parallel": (
        "AutoTP needs the same rows on all ranks that share a layer, and this engine gives every rank rows of its own",
        "leave it out and use zero3, or --engine megatron with parallel.tensor_model_parallel_size",
    ),
    "activation_checkpointing": (
        "it only serves models that call deepspeed.checkpointing",
        "leave it out and set train.recompute: full",
    ),
    "checkpoint": ("checkpoints are the engine's own", "leave it out and set checkpoint.interval"),
    "zero_optimization.round_robin_gradients": (
        "DeepSpeed 0.19 then maps masters to the wrong weights",
        "leave it out or set it to false",
    ),
    "zero_optimization.cpu_offload": ("DeepSpeed has given it up", "write offload_optimizer: {device: cpu}"),
    "zero_optimization.zero_quantized_weights": ("ZeRO++ is not supported", "leave it out"),
    "zero_optimization.zero_quantized_gradients": ("ZeRO++ is not supported", "leave it out"),
    "zero_optimization.zero_hpz_partition_size": ("ZeRO++ is not supported", "leave it out"),
    "bf16.bf16_master_weights_and_grads": ("masters and gradients are fp32", "leave it out"),
    "fp16.fp16_master_weights_and_grads": ("masters and gradients are fp32", "leave it out"),
}


def check(job: JobConfig) -> None:
    """Whatever can be wrong with ``strategy.deepspeed`` before anything starts.

    Raises:
        JobError: no such preset or file; a key that is not known, or that contradicts the job.
    """
    zero = settings(job, hidden_size=1, data_parallel_size=_ranks(job)).get("zero_optimization") or {}
    blocks = [zero.get(name) or {} for name in ("offload_optimizer", "offload_param")]
    path = job.strategy.nvme_path
    if path and not any(block.get("nvme_path") == path for block in blocks):
        raise JobError(
            "strategy.nvme_path",
            f"{path!r} has no effect: {job.strategy.deepspeed} offloads nothing to it",
            "--deepspeed zero3_nvme, or leave it out",
        )


def settings(job: JobConfig, *, hidden_size: int | None, data_parallel_size: int | None) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``.

    Args:
        job: the job.
        hidden_size: the model's; decides bucket sizes that are left to ``"auto"``. None: DeepSpeed's defaults.
        data_parallel_size: ranks; None where it is not known yet.

    Raises:
        JobError: see `check`.
    """
    given = read(job)
    _check_keys(given)
    zero = dict(given.get("zero_optimization") or {})
    stage = _stage(zero)
    _check_stage(job, zero, stage)
    batches = _batches(job, data_parallel_size)
    for key, (value, job_key) in batches.items():
        _must_agree(key, given.get(key, AUTO), value, job_key)
    _must_agree(
        "gradient_clipping", given.get("gradient_clipping", AUTO), job.optimizer.clip_grad, "optimizer.clip_grad"
    )
    for kind in ("fp16", "bf16"):
        enabled = (given.get(kind) or {}).get("enabled", AUTO)
        _must_agree(f"{kind}.enabled", enabled, job.train.precision == kind, "train.precision")
    _must_agree(
        "data_types.grad_accum_dtype", (given.get("data_types") or {}).get("grad_accum_dtype", AUTO), "fp32", ""
    )
    _must_agree("zero_allow_untested_optimizer", given.get("zero_allow_untested_optimizer", AUTO), True, "")
    _must_agree("zero_force_ds_cpu_optimizer", given.get("zero_force_ds_cpu_optimizer", AUTO), False, "")
    _must_agree("zero_optimization.allgather_partitions", zero.get("allgather_partitions", AUTO), True, "")
    _check_loss_scale(job, given)
    _fill(zero, job, hidden_size)
    return _assemble(job, given, zero, stage)


def read(job: JobConfig) -> dict[str, Any]:
    """What the preset or the file says, as it stands there.

    Raises:
        JobError: neither a preset nor a readable JSON object.
    """
    name = job.strategy.deepspeed
    assert name is not None, "the strategy is deepspeed"
    if name in PRESETS:
        return {"zero_optimization": copy.deepcopy(PRESETS[name])}
    path = Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"give one of {', '.join(PRESETS)}, or the path of a JSON file"
        raise JobError(KEY, f"{name!r} is neither a preset nor a file", hint)
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError(KEY, f"{path} cannot be read as JSON: {error}", "correct the file") from error
    if not isinstance(given, dict):
        raise JobError(KEY, f"{path} holds no JSON object", 'write {"zero_optimization": {"stage": 3}}')
    return given


def _check_loss_scale(job: JobConfig, given: Mapping[str, Any]) -> None:
    """The dynamic loss scale follows one rule under every strategy (`_clip.LossScale`)."""
    if job.train.precision != "fp16":
        return
    block = given.get("fp16") or {}
    power = block.get("initial_scale_power", AUTO)
    if power != AUTO:
        _must_agree("fp16.initial_scale_power", 2.0**power, job.train.initial_loss_scale, "train.initial_loss_scale")
    for key, wanted in _LOSS_SCALE.items():
        _must_agree(f"fp16.{key}", block.get(key, AUTO), wanted, "")


def _ranks(job: JobConfig) -> int | None:
    return job.cluster.nnodes * job.cluster.nproc_per_node if job.cluster.nproc_per_node else None


def _batches(job: JobConfig, ranks: int | None) -> dict[str, tuple[int, str]]:
    """DeepSpeed's key -> (its value by the job, the job's key)."""
    train = job.train
    found = {
        "train_batch_size": (train.global_batch_size, "train.global_batch_size"),
        "train_micro_batch_size_per_gpu": (train.micro_batch_size, "train.micro_batch_size"),
    }
    if ranks:
        steps = max(train.global_batch_size // (train.micro_batch_size * ranks), 1)
        found["gradient_accumulation_steps"] = (steps, "train.global_batch_size")
    return found


def _must_agree(key: str, value: Any, wanted: Any, job_key: str) -> None:
    if value in (AUTO, wanted):
        return
    if job_key:
        raise JobError(
            KEY,
            f"{key} is {json.dumps(value)}, but {job_key} makes it {json.dumps(wanted)}",
            f'set {key} to "auto", or change {job_key}',
        )
    raise JobError(KEY, f"{key} is {json.dumps(value)}; only {json.dumps(wanted)} is supported", "leave it out")


def _flat(given: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, frozenset[str]]]:
    """(dotted key, key, value, keys that may stand beside it) of everything that is given."""
    for key, value in given.items():
        yield key, key, value, TOP_KEYS
    sections = {"zero_optimization": ZERO_KEYS, **SECTION_KEYS}
    for section, known in sections.items():
        node: Any = given
        for part in section.split("."):
            node = (node or {}).get(part)
        if node is None:
            continue
        if not isinstance(node, Mapping):
            raise JobError(KEY, f"{section} is {json.dumps(node)}; it must be an object", f'write "{section}": {{...}}')
        for key, value in node.items():
            yield f"{section}.{key}", key, value, known


def _check_keys(given: Mapping[str, Any]) -> None:
    for dotted, key, value, known in _flat(given):
        if dotted in _REFUSED:
            if value in (False, None):
                continue  # switched off
            reason, remedy = _REFUSED[dotted]
            raise JobError(KEY, f"{dotted}: {reason}", remedy)
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise JobError(
                KEY,
                f"{dotted}: not known here; DeepSpeed would pass over a misspelt key without a word",
                f"did you mean {near[0]}?" if near else "leave it out",
            )


def _stage(zero: Mapping[str, Any]) -> int:
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise JobError(KEY, f"zero_optimization.stage is {json.dumps(stage)}", "set it to 0, 1, 2 or 3")
    return stage


def _check_stage(job: JobConfig, zero: Mapping[str, Any], stage: int) -> None:
    if stage and job.optimizer.name == "muon":
        raise JobError(
            "optimizer.name",
            f"muon works on whole matrices, and ZeRO stage {stage} gives each rank a flat piece of many",
            "use optimizer.name: adamw, or strategy.deepspeed: zero0",
        )
    if stage == 1 and zero.get("overlap_comm") not in (None, False, AUTO):
        raise JobError(
            KEY,
            "zero_optimization.overlap_comm with stage 1 loses gradients of weights that the last micro-batch of a "
            "step does not use (experts)",
            "leave it out, or use stage 2",
        )
    for name, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        device = (zero.get(name) or {}).get("device", "none")
        if device not in ("none", "cpu", "nvme"):
            raise JobError(KEY, f"zero_optimization.{name}.device is {json.dumps(device)}", "set cpu, nvme or none")
        if device != "none" and stage not in stages:
            raise JobError(KEY, f"zero_optimization.{name} does nothing with stage {stage}", f"use stage {stages[-1]}")
        if device == "nvme":
            _check_nvme(job, zero[name], name, stage)


def _check_nvme(job: JobConfig, block: Mapping[str, Any], name: str, stage: int) -> None:
    if stage != 3:
        raise JobError(KEY, f"zero_optimization.{name}.device nvme needs stage 3", "set stage to 3, or device to cpu")
    if block.get("nvme_path", AUTO) == AUTO and not job.strategy.nvme_path:
        raise JobError(
            "strategy.nvme_path", f"{job.strategy.deepspeed} offloads to a local disk", "name a folder there"
        )


def _fill(zero: dict[str, Any], job: JobConfig, hidden_size: int | None) -> None:
    """Replace every ``"auto"``; sizes as `transformers.integrations.deepspeed` does."""
    sizes = {}
    if hidden_size is not None:
        sizes = {
            "reduce_bucket_size": hidden_size * hidden_size,
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
            "stage3_param_persistence_threshold": 10 * hidden_size,
        }
    for key in [key for key, value in zero.items() if value == AUTO]:
        if key in sizes:
            zero[key] = sizes[key]
        else:
            del zero[key]  # DeepSpeed's default
    for name in ("offload_optimizer", "offload_param"):
        block = zero.get(name)
        if not block:
            continue
        block = zero[name] = dict(block)
        if block.get("device") == "nvme" and block.get("nvme_path", AUTO) == AUTO:
            block["nvme_path"] = job.strategy.nvme_path
        for key in [key for key, value in block.items() if value == AUTO]:
            del block[key]


def _assemble(job: JobConfig, given: Mapping[str, Any], zero: dict[str, Any], stage: int) -> dict[str, Any]:
    """Gradients add up in our own loop, so DeepSpeed is told of one micro-batch a step and of no clipping. Stage 0 has
    no master weights of its own: there weights stay fp32 and the forward pass runs under autocast."""
    precision = job.train.precision if stage else "fp32"
    made: dict[str, Any] = {
        key: copy.deepcopy(given[key])
        for key in ("aio", "steps_per_print", "wall_clock_breakdown", "memory_breakdown")
        if given.get(key, AUTO) != AUTO
    }
    made |= {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": job.train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if precision == "bf16":
        immediate = (given.get("bf16") or {}).get("immediate_grad_update", AUTO)
        made["bf16"]["immediate_grad_update"] = True if immediate == AUTO else immediate
    if precision == "fp16":
        made["fp16"]["loss_scale"] = 1.0  # the strategy scales the loss itself
    communication = given.get("communication_data_type", AUTO)
    made["communication_data_type"] = "fp32" if communication == AUTO else communication
    return made
