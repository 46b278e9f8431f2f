"""A whole driver process with a cluster of its own, around the toy entry: for tests that kill or interrupt it.

driver.py RUN_DIR '{"steps": ...}' '{"nproc_per_node": 2, ...}'
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from toy import Notes, toy_plan

from swift_dist.cluster.devices import Devices
from swift_dist.cluster.gang import Gang
from swift_dist.cluster.interrupts import Interrupts
from swift_dist.cluster.placement import Demand, Placement
from swift_dist.cluster.runtime import Cluster


def main() -> int:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    plan = toy_plan(Path(sys.argv[1]), json.loads(sys.argv[2]), **json.loads(sys.argv[3]))
    ranks = plan.settings.nproc_per_node or 1
    try:
        with Interrupts() as interrupts, Cluster(plan.settings) as cluster:
            cluster.start(Devices(use_gpu=False, nproc_per_node=ranks))
            cluster.connect()
            interrupts.install()
            demand = Demand.of(plan.settings, ranks, use_gpu=False)
            with Placement(demand, 20) as placement, Gang(plan, placement, interrupts, Notes()) as gang:
                result = gang.run()
    except KeyboardInterrupt:
        return 130
    print(json.dumps({"state": result.state, "results": result.results}))
    return 130 if result.state == "interrupted" else 0


if __name__ == "__main__":
    sys.exit(main())
