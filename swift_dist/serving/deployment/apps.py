"""Ray Serve's side of a deployment: an application for each version, run, resized and deleted.

The applications answer no HTTP: Serve places the replicas, watches their health and replaces them, no more.
"""

from __future__ import annotations

import logging

from swift_dist.serving.deployment.replica import EngineReplica, ReplicaSpec

DEPLOYMENT = "replica"  # the name within each application
GRACE_SECONDS = 20.0  # beside the time that running requests get


def start_serve() -> bool:
    """Have Serve run on this cluster, without proxies. Returns whether it had to be started."""
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it tells of its start and of each application, else
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        return False
    except ValueError:
        serve.start(proxy_location="Disabled", http_options={"host": "127.0.0.1"}, logging_config=_QUIET)
        return True


_QUIET = {"enable_access_log": False, "log_level": "WARNING"}


class Applications:
    """Those of one deployment, whose names begin with `prefix`. Methods block: call them from a thread."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def name(self, version: str) -> str:
        return f"{self._prefix}-{version}"

    def run(self, spec: ReplicaSpec, num_replicas: int, num_cpus: float, num_gpus: int) -> None:
        """Have Serve run a version; does not wait. A start that fails twice in a row is given up."""
        from ray import serve
        from ray.serve.api import RunTarget

        as_deployment = serve.deployment(
            name=DEPLOYMENT,
            num_replicas=num_replicas,
            health_check_period_s=1.0,
            health_check_timeout_s=15.0,
            graceful_shutdown_timeout_s=spec.drain_seconds + GRACE_SECONDS,
            graceful_shutdown_wait_loop_s=0.1,
            max_constructor_retry_count=2,
            ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
            logging_config=_QUIET,
        )
        deployment = as_deployment(EngineReplica)
        target = RunTarget(
            target=deployment.bind(spec), name=spec.application, route_prefix=None, external_scaler_enabled=True
        )
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)

    def scale(self, version: str, num_replicas: int) -> None:
        """Set the number of replicas; running ones stay. What Serve's REST API does, without its dashboard."""
        import ray
        from ray.serve._private.common import DeploymentID
        from ray.serve.context import _get_global_client

        client = _get_global_client()
        assert client
        deployment = DeploymentID(DEPLOYMENT, self.name(version))
        ray.get(client._controller.update_deployment_replicas.remote(deployment, num_replicas))

    def running(self) -> set[str]:
        """Versions that Serve knows."""
        from ray import serve

        prefix = self.name("")
        return {name.removeprefix(prefix) for name in serve.status().applications if name.startswith(prefix)}

    def failure(self, version: str) -> str | None:
        """The end of Serve's words, where it has given a version's start up."""
        from ray import serve

        application = serve.status().applications.get(self.name(version))
        if application is None or application.status != "DEPLOY_FAILED":
            return None
        words = [d.message for d in application.deployments.values() if d.message] or [application.message]
        return words[0].strip().splitlines()[-1]

    def delete(self, version: str, wait: bool = False) -> None:
        """End it: its replicas drain first."""
        from ray import serve

        serve.delete(self.name(version), _blocking=wait)


def actor_lives(replica_id: str) -> bool:
    """Whether a replica's actor is there, as Ray knows at once."""
    import ray

    try:
        ray.get_actor(replica_id, namespace="serve")
    except ValueError:
        return False
    return True
