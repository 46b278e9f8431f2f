"""Wait until all nodes of a Ray cluster are there: ``python -m swift_dist.cluster.join --nodes 2 --seconds 180``.

What starts a cluster node by node (slurm/ray_cluster.sh) runs it before the driver, which finds all it asks for or is
told at once that it never will. The cluster is the one at RAY_ADDRESS.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

EXIT_ABSENT = 72
"""Not all nodes joined in time."""
_POLL_SECONDS = 0.2


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    wanted = parser.parse_args()
    address = os.environ["RAY_ADDRESS"]
    joined: list[str] = []
    deadline = time.monotonic() + wanted.seconds
    while time.monotonic() < deadline:
        joined = alive(address)
        if len(joined) >= wanted.nodes:
            return 0
        time.sleep(_POLL_SECONDS)
    print(
        f"only {len(joined)} of {wanted.nodes} nodes joined the Ray cluster at {address} within {wanted.seconds:g} s: "
        f"{', '.join(joined) or 'none'}",
        file=sys.stderr,
    )
    return EXIT_ABSENT


def alive(address: str) -> list[str]:
    """Addresses of the nodes that live; none while nothing answers."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]

    try:
        nodes = GcsClient(address=address).get_all_node_info(timeout=5).values()
    except Exception:  # Ray's errors of a connection that is not there yet have no common base
        return []
    return [node.node_manager_address for node in nodes if node.state == GcsNodeInfo.GcsNodeState.ALIVE]


if __name__ == "__main__":
    sys.exit(main())
