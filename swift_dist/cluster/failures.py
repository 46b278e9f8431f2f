"""What can go wrong with a rank, as values that any transport carries."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Literal

Kind = Literal["job", "run", "error", "died", "stalled", "communication", "unresponsive"]

_COMMUNICATION_TYPES = frozenset(
    {"DistError", "DistBackendError", "DistNetworkError", "DistStoreError", "ConnectionError", "BrokenPipeError"}
)
_COMMUNICATION_WORDS = (
    "Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "gloo/transport",
    "[/pytorch/third_party/gloo", "Gloo connect", "NCCL error", "ncclRemoteError", "ncclSystemError",
    "ncclInternalError", "communicator was aborted", "Timed out waiting", "wait timeout", "Socket Timeout",
    "failed to recv", "failed to connect", "Application timeout", "unhandled system error",
)  # fmt: skip
_DEVICE_WORDS = ("CUDA error", "CUDA out of memory", "cuBLAS", "CUBLAS_STATUS", "cuDNN error", "NCCL")


@dataclass(frozen=True)
class Failure:
    """Why one rank did not finish an attempt.

    Attributes:
        rank: which one.
        kind: ``job`` (it found the job wrong), ``run`` (it ended the run on purpose, with a remedy), ``error`` (any
            other exception), ``died`` (its process is gone), ``stalled`` (it was found behind a stall),
            ``communication`` (a peer was gone), ``unresponsive`` (it did not come back after a peer had failed).
        message: one line.
        host, log: where, and which file says more.
        step: steps done when it happened.
        time: seconds since the epoch.
        traceback: of the exception, or "".
        key, remedy: of a JobError or RunError.
        reusable: whether its process can take part in the next attempt.
    """

    rank: int
    kind: Kind
    message: str
    host: str = ""
    log: str = ""
    step: int = 0
    time: float = 0.0
    traceback: str = ""
    key: str = ""
    remedy: str = ""
    reusable: bool = False

    def describe(self) -> str:
        """One sentence for people: who, where, what."""
        where = f"rank {self.rank}" + (f" on {self.host}" if self.host else "")
        return f"{where}, step {self.step}: {self.message}"


def is_communication_error(error: BaseException) -> bool:
    """Whether an exception, or what it was raised from, says that a peer was lost rather than that this rank erred."""
    seen: BaseException | None = error
    while seen is not None:
        if any(kind.__name__ in _COMMUNICATION_TYPES for kind in type(seen).__mro__):
            return True
        text = str(seen)
        if isinstance(seen, (RuntimeError, OSError)) and any(words in text for words in _COMMUNICATION_WORDS):
            return True
        seen = seen.__cause__
    return False


def is_device_error(error: BaseException) -> bool:
    """Whether the process's device context may be broken, so that only a new process is safe."""
    return any(words in str(error) for words in _DEVICE_WORDS)


def describe_exception(error: BaseException) -> str:
    """``Type: message`` in one line."""
    return " ".join(traceback.format_exception_only(error)[-1].split())[:500]
