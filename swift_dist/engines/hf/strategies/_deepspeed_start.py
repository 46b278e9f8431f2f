"""Starting DeepSpeed in a process that has joined its group already, and taking away what it leaves behind."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from swift_dist.engines.hf.strategies._first_rank import hand_out, hand_out_the_rest
from swift_dist.errors import JobError, RunError

STALE_LOCK_SECONDS = 1800.0
"""A build's lock that nobody has touched for this long is one of a killed process."""


class Traces:
    """What DeepSpeed wants of this process, and what it changes beyond its own engine; `undo` puts it all back.

    - It takes its device from the environment, also while it trains: ``LOCAL_RANK`` and ``DS_ACCELERATOR``.
    - ZeRO-3 replaces ``torch.nn.functional.linear`` "until manually reset".
    - Its modules keep process groups, which a later engine of this process would find gone.
    - ZeRO-3 numbers weights and modules through all models of a process, and ranks compare their numbers: of a gang in
      which one rank was replaced, the others would go on counting.
    - It logs a great deal on standard output, and calls collectives by names that torch warns about at every call.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        values = {"LOCAL_RANK": str(device.index or 0), "DS_ACCELERATOR": device.type}
        self._environment = {name: os.environ.get(name) for name in values}
        os.environ.update(values)
        self._linear = torch.nn.functional.linear
        importlib.import_module("torch._dynamo")  # before DeepSpeed's ZeRO-3, which must not find it half imported
        from deepspeed.utils import logger

        self._logger, self._level = logger, logger.level
        logger.setLevel(max(logging.WARNING, self._level))
        self._quiet = warnings.catch_warnings()
        self._quiet.__enter__()
        warnings.filterwarnings("ignore", r".torch\.distributed\.\w+. is deprecated", FutureWarning)

    def undo(self) -> None:
        from deepspeed.comm import comm
        from deepspeed.runtime.zero import parameter_offload, partition_parameters
        from deepspeed.utils import groups

        partition_parameters.Init.param_id = 0
        modules = parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0]  # its counter
        modules[:] = [0]
        parameter_offload.FWD_MODULE_STACK.clear()  # a forward that a peer's death cut short leaves its modules there
        torch.nn.functional.linear = self._linear
        self._logger.setLevel(self._level)
        self._quiet.__exit__(None, None, None)
        groups._release_process_group_references(None)
        comm.cdb = None
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def no_builds() -> Iterator[None]:
    """Around ``deepspeed.initialize``, whose communication layer would compile an op for shared memory between CPU
    ranks (2 minutes, and only for DeepSpeed's inference kernels) and ask compilers about forty more: it is told that
    none of them can be had."""
    from deepspeed import ops

    known = vars(ops).get("__compatible_ops__")
    vars(ops)["__compatible_ops__"] = {}
    try:
        yield
    finally:
        if known is None:
            vars(ops).pop("__compatible_ops__", None)
        else:
            vars(ops)["__compatible_ops__"] = known


def partition_from_first_rank(model: torch.nn.Module, config: dict[str, Any], device: torch.device) -> None:
    """ZeRO-3's partition of a model that only the first rank has whole, one weight at a time. Collective.

    ``zero.Init`` sends each weight from the first rank before it cuts it, so all that other ranks need is room for one.

    Args:
        model: on the CPU of the first rank, on the meta device of the others.
        config: for ``deepspeed.initialize``.
        device: of this rank.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    class FromFirstRank(Init):
        def _convert_to_zero_parameters(self, param_list: Iterable[Any]) -> None:
            for parameter in param_list:
                hand_out([parameter], device)
                parameter.data = parameter.data.to(self.dtype)
                self._convert_to_deepspeed_param(parameter)
                parameter.partition()

    hand_out_the_rest(model, device)
    FromFirstRank(module=model, config_dict_or_path=config)


def prepare_nvme(config: dict[str, Any], precision: str) -> None:
    """Offload to a disk needs DeepSpeed's asynchronous I/O, which is compiled on first use (minutes).

    Raises:
        JobError: weights would be rounded. DeepSpeed 0.19 (``_set_dtype`` in partition_parameters.py) keeps weights
            on a disk in bf16 wherever the device has no fp16, whatever it was told.
        RunError: it cannot be compiled here.
    """
    zero = config["zero_optimization"]
    on_disk = {
        name for name in ("offload_optimizer", "offload_param") if (zero.get(name) or {}).get("device") == "nvme"
    }
    if not on_disk:
        return
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if "offload_param" in on_disk and precision != "bf16" and not get_accelerator().is_fp16_supported():
        raise JobError(
            "train.precision",
            f"{precision}: DeepSpeed would round weights on NVMe to bf16, because this device has no fp16",
            "use train.precision: bf16, or leave zero_optimization.offload_param out",
        )
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise RunError(
            "offload to NVMe needs DeepSpeed's asynchronous I/O, which cannot be compiled on this node",
            "install libaio's headers (libaio-dev, libaio-devel) and a C++ compiler, or use zero3_offload",
        )
    clear_stale_locks()


def clear_stale_locks(age: float = STALE_LOCK_SECONDS) -> list[Path]:
    """Remove locks that killed builds left in torch's folder of compiled extensions: later runs would wait for ever.

    Returns:
        What was removed.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    removed = []
    for lock in root.glob("**/lock"):
        with contextlib.suppress(OSError):
            if time.time() - lock.stat().st_mtime > age:
                lock.unlink()
                removed.append(lock)
    return removed
