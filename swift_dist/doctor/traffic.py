"""A process that takes part in measured collectives: as many a node as the job would have ranks there.

    python -m swift_dist.doctor.traffic '{"address": "10.0.0.1", "device": "cpu"}'

It prints one line with the address of a store that it serves. Then each line of its standard input asks it to meet
others at somebody's store and to measure; each answer is a line too. It ends when its input does. A process of its own,
because a broken collective can be ended by nothing else, and because ranks run in such processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

SMALL_BYTES = 64 * 2**10
LARGE_BYTES = {"gloo": 4 * 2**20, "nccl": 256 * 2**20}
"""Of one rank's buffer. Over a slow link less is sent, so that its speed is still measured."""
_OP_SECONDS = 0.25
"""What the repeats of one measured collective take together, and one of them at most."""
_REPEATS, _MOST_REPEATS = 2, 50


def main() -> int:
    spec = json.loads(sys.argv[1])
    reply = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    orders: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    server = _serve(spec["address"])
    print(json.dumps({"store": f"{spec['address']}:{server.port}"}), file=reply, flush=True)
    while True:
        order = json.loads(orders.get())
        try:
            answer = _meet(order, spec)
        except Exception as error:
            answer = {"error": " ".join(str(error).split())[:300] or type(error).__name__}
        print(json.dumps({"key": order["key"], **answer}), file=reply, flush=True)


def _listen(orders: queue.Queue[str]) -> None:
    for line in sys.stdin:
        orders.put(line)
    os._exit(0)  # also out of a collective that hangs


def _serve(address: str) -> Any:
    """A store on one address, at a port that the kernel chose and nobody can take in between."""
    from torch.distributed import TCPStore

    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    return TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _meet(order: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """Join the group of an order ({"store", "key", "rank", "size", "seconds"}) and measure in it."""
    from torch.distributed import PrefixStore, TCPStore

    deadline = time.monotonic() + order["seconds"]
    host, _, port = order["store"].rpartition(":")
    timeout = timedelta(seconds=order["seconds"])
    store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timeout)
    timeout = timedelta(seconds=max(1.0, deadline - time.monotonic()))  # who comes late makes the next pair late too
    group = _group(PrefixStore(order["key"], store), order["rank"], order["size"], timeout, spec)
    try:
        return _measure(group, order["size"], spec["device"])
    finally:
        with contextlib.suppress(Exception):
            getattr(group, "abort", lambda: None)()


def _group(store: Any, rank: int, size: int, timeout: timedelta, spec: dict[str, Any]) -> Any:
    import torch
    import torch.distributed as dist

    gloo: Any = dist.ProcessGroupGloo  # its stub lacks what it has
    if spec["device"] != "cpu":
        torch.cuda.set_device(spec["device"])
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, nccl)
    options = gloo._Options()
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    options._devices = [
        gloo.create_device(interface=interface) if interface else gloo.create_device(hostname=spec["address"])
    ]
    options._timeout = timeout
    return gloo(store, rank, size, options)


def _measure(group: Any, size: int, device: str) -> dict[str, float]:
    """Seconds of a small all-reduce, and bus bandwidth (bytes a second that a rank's link carries each way).

    With S bytes a rank and n ranks an all-reduce moves 2 (n - 1) / n S over each link, an all-to-all (n - 1) / n S:
    the definitions of nccl-tests.
    """
    import torch
    import torch.distributed as dist

    def timed(run: Callable[[], Any]) -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run().wait()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def agreed(seconds: float) -> float:
        """The slowest rank's."""
        value = torch.tensor([seconds], dtype=torch.float64, device=device)
        options: Any = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX
        group.allreduce([value], options).wait()
        return value.item()

    def best(run: Callable[[], Any]) -> float:
        """Of as many times as all ranks agree on: others that use the machine must not make a link look slow."""
        first = agreed(timed(run))
        repeats = max(_REPEATS, min(_MOST_REPEATS, int(_OP_SECONDS / first)))
        return agreed(min(first, *(timed(run) for _ in range(repeats))))

    small = torch.ones(SMALL_BYTES // 4, device=device)
    word = torch.ones(1, device=device)
    timed(lambda: group.allreduce([small]))  # connects
    latency = best(lambda: group.allreduce([word]))
    affordable = SMALL_BYTES * _OP_SECONDS / best(lambda: group.allreduce([small]))
    largest = LARGE_BYTES["gloo" if device == "cpu" else "nccl"]
    count = max(size, int(min(largest, max(SMALL_BYTES, affordable))) // 4 // size * size)
    large, other = torch.ones(count, device=device), torch.empty(count, device=device)
    num_bytes = 4 * count
    reduce_seconds = best(lambda: group.allreduce([large]))
    exchange_seconds = best(lambda: group.alltoall_base(other, large, [], []))
    share = (size - 1) / size * num_bytes
    return {
        "latency": latency,
        "all_reduce": 2 * share / reduce_seconds,
        "all_to_all": share / exchange_seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
