"""Which engine serves: the one that was asked for, or the first that can run here."""

from __future__ import annotations

import logging

from swift_dist.errors import JobError
from swift_dist.plugins import UnknownPlugin, find
from swift_dist.serving.engines.base import Engine
from swift_dist.serving.options import EngineOptions

ROOM = "swift_dist.serving.engines"
log = logging.getLogger(__name__)

_AUTOMATIC = ("vllm", "hf")  # lmdeploy makes an environment of its own, which is done for those who ask for it


def choose(options: EngineOptions, use_gpu: bool | None = None) -> Engine:
    """The engine of `options.infer_backend`.

    Args:
        use_gpu: what it is to compute on (None: that is not known yet).

    Raises:
        JobError: there is no such engine, or it cannot run here, and why.
    """
    name = options.infer_backend
    if name == "auto":
        *others, last = (find_engine(one) for one in _AUTOMATIC)
        for engine in others:
            why_not = engine.why_not() or (None if use_gpu is None else engine.why_not_on(use_gpu))
            if why_not is None:
                return engine
            log.info("the %s engine serves: %s", last.name, why_not)
        return last  # which runs wherever this package does
    engine = find_engine(name)
    why_not = engine.why_not()
    if why_not is not None:
        raise JobError("infer_backend", f"{name} cannot run here: {why_not}", "Use --infer_backend hf, or auto.")
    return engine


def uses_gpu(options: EngineOptions, gpus: float, where: str) -> bool:
    """Whether engines compute on GPUs.

    Args:
        gpus: that there are. where: whose they are, for messages.

    Raises:
        JobError: they are asked for, and there are none.
    """
    if options.accelerator == "gpu" and not gpus:
        raise JobError("accelerator", f"{where} has no GPU", "--accelerator cpu, or leave it out")
    return gpus > 0 and options.accelerator != "cpu"


def find_engine(name: str) -> Engine:
    """The engine of that name (engines/NAME.py, or 'package.module:ATTRIBUTE'), whether or not it can run here.

    Raises:
        JobError: there is none, with what was probably meant.
    """
    try:
        engine: Engine = find(ROOM, name, "ENGINE")
    except UnknownPlugin as error:
        raise JobError("infer_backend", str(error), "Use --infer_backend auto.") from None
    return engine
