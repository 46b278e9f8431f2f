"""Whether a node has installed what the one who submitted the job has: else numbers differ, or nothing starts."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping

from swift_dist.errors import JobError
from swift_dist.runs.manifest import versions

VARIABLE = "SWIFT_DIST_EXPECTED_VERSIONS"
"""Set by a launcher for the job it submits; the driver and every rank compare (see `environment.PASSED`)."""
COMPARED = ("swift-dist", "torch", "megatron-core", "ray", "python")


def expected() -> str:
    """The value of `VARIABLE` for a job submitted from here."""
    return json.dumps(_compared())


def _compared() -> dict[str, str]:
    """Without build tags (2.13.0+cpu) and Python's patch level: a cluster's build for its GPUs is the same version."""
    found = {name: value.partition("+")[0] for name, value in versions().items() if name in COMPARED}
    return {**found, "python": ".".join(found["python"].split(".")[:2])}


def check_versions(environ: Mapping[str, str]) -> None:
    """Compare this node with the submitter, if there is one.

    Raises:
        JobError: naming the node and every difference.
    """
    if VARIABLE not in environ:
        return
    wanted, here = json.loads(environ[VARIABLE]), _compared()
    different = [
        f"{name} {here.get(name, 'not installed')} (submitter: {wanted.get(name, 'not installed')})"
        for name in COMPARED
        if here.get(name) != wanted.get(name)
    ]
    if different:
        raise JobError(
            "launch.ray.check_versions",
            f"node {socket.gethostname()} has other versions than the submitter: {', '.join(different)}",
            "install the same on both, or --launch.ray.check_versions false to run all the same",
        )
