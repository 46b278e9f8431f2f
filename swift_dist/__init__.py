"""swift_dist: distributed-first training of large models.

A job file becomes a parallel layout, the layout becomes a gang of Ray actors, the gang runs an engine, and the
engine writes checkpoints that convert, serve and resume anywhere.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Engine",
    "__version__",
    "from_pretrained",
    "infer",
    "job_config",
    "prepare_model",
    "pretrain",
    "rlhf",
    "sft",
]

if TYPE_CHECKING:
    from swift_dist.api import job_config, pretrain, rlhf, sft
    from swift_dist.mixing import from_pretrained, prepare_model
    from swift_dist.serving.engine import Engine, infer


def __getattr__(name: str) -> Any:
    # Lazily, so that `swift-dist --help` and every rank's start do not pay for what they do not use.
    if name in ("job_config", "pretrain", "rlhf", "sft"):
        from swift_dist import api

        return getattr(api, name)
    if name in ("from_pretrained", "prepare_model"):
        from swift_dist import mixing

        return getattr(mixing, name)
    if name in ("Engine", "infer"):
        from swift_dist.serving import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
