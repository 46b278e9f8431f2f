"""The KubeRay launcher: the job as a RayJob, which the KubeRay operator turns into a Ray cluster of pods of its own.

Fields after KubeRay's API reference, ray.io/v1. Applied and watched through `kubectl` with the user's own rights.

Ports: every pod has an address of its own, so Ray's defaults are free.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import subprocess
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field

from swift_dist.config.section import Section
from swift_dist.errors import JobError, RunError
from swift_dist.launchers._base import State, Submission, Where, command_line

if TYPE_CHECKING:
    from swift_dist.config import JobConfig

log = logging.getLogger(__name__)

STATES: dict[str, State] = {
    "": "waiting",
    "PENDING": "waiting",
    "RUNNING": "running",
    "SUCCEEDED": "done",
    "STOPPED": "interrupted",
    "FAILED": "failed",
}
"""RayJob's status.jobStatus in our words."""
_POLL_SECONDS = 5.0
_NEW_POD_SECONDS = 600.0
"""`cluster.replacement_timeout` of a job that names none."""
_PATIENCE_SECONDS = 180.0
"""How long `wait` bears an API server that does not answer."""


class Options(Section):
    image: str | None = Field(None, description="container image with swift_dist in it (docs/clusters.md)")
    namespace: str = Field("default", description="Kubernetes namespace")
    volume_claim: str | None = Field(None, description="PersistentVolumeClaim that holds data and runs, on all pods")
    mount_path: str | None = Field(None, description="where it is mounted; must be the path that it has here")
    cpus: int = Field(8, gt=0, description="CPUs of a worker pod")
    memory: str = Field("64Gi", description="memory of a worker pod")
    shm: str = Field("16Gi", description="size of /dev/shm, in memory")
    gpu_resource: str = Field("nvidia.com/gpu", description="resource name of a GPU")
    node_selector: dict[str, str] = Field({}, description="labels of the machines that worker pods may use")
    tolerations: tuple[dict[str, Any], ...] = Field((), description="Kubernetes tolerations of worker pods")
    service_account: str | None = Field(None, description="service account of all pods")
    token_auth: bool = Field(True, description="Ray token authentication (KubeRay 1.5 and later)")
    keep_seconds: int = Field(300, ge=0, description="seconds that the finished cluster stays, for its logs")


class KubeRayHandle:
    """A RayJob, by its name.

    Args:
        run: the run folder, for `wait`.
    """

    def __init__(self, submission: Submission, run: Path | None = None) -> None:
        self._name, self._namespace, self._run = submission.id, submission.address, run

    def status(self) -> State:
        return _state_of(self._state())

    def logs(self, follow: bool = False) -> Iterator[str]:
        """Of the submitter's pod, which follows the driver."""
        words = _kubectl(self._namespace, "logs", f"job/{self._name}", *(["-f"] if follow else []))
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            yield from (line.rstrip("\n") for line in process.stdout)

    def stop(self) -> None:
        """Takes the pods away; they get SIGTERM, at which the driver checkpoints, and a minute to end."""
        _run(_kubectl(self._namespace, "delete", "rayjob", self._name, "--wait=false"))

    def wait(self) -> dict[str, Any]:
        from swift_dist.runs.outcome import read_outcome
        from swift_dist.runs.submission import read_submission

        assert self._run is not None
        began = time.monotonic()
        details = self._end()
        state = _state_of(details)
        if state not in ("done", "interrupted"):
            message = details.get("message") or details.get("reason") or "no message"
            raise RunError(
                f"RayJob {self._name} ended as {state}: {message}",
                f"kubectl -n {self._namespace} describe rayjob {self._name}",
            )
        noted = read_submission(self._run) or {}
        keys = ("export", "export_step", "message", "step", "loss", "checkpoint", "restarts")
        unknown = dict.fromkeys(keys)  # where the folder cannot be seen from here
        outcome = read_outcome(self._run, after=noted.get("attempts", 0)) or {"output": str(self._run), **unknown}
        return {**outcome, "state": state, "seconds": round(time.monotonic() - began, 3)}

    def _end(self) -> dict[str, Any]:
        """Its status once it has ended; one that goes away while it is watched was stopped."""
        answered, seen = time.monotonic(), False
        while True:
            try:
                details = _status_of(self._namespace, self._name) if seen else self._state()
                if details is None:
                    return {"jobStatus": "STOPPED"}
                if _state_of(details) not in ("waiting", "running"):
                    return details
                answered, seen = time.monotonic(), True
            except RunError as error:
                if time.monotonic() - answered > _PATIENCE_SECONDS:
                    raise
                log.warning("%s; asking again", error.message)
            time.sleep(_POLL_SECONDS)

    def _state(self) -> dict[str, Any]:
        details = _status_of(self._namespace, self._name)
        if details is None:
            raise JobError(
                "run", f"RayJob {self._name} is not in namespace {self._namespace}", "it was deleted; submit it again"
            )
        return details


class KubeRayLauncher:
    where: Where = "elsewhere"
    no_deployments = (
        "nothing of a RayJob leads clients to an API in its head's pod, and its pods go before requests are answered"
    )

    def render(self, job: JobConfig) -> str:
        return yaml.safe_dump(manifest(job), sort_keys=False, width=10**6)

    def submit(self, job: JobConfig) -> KubeRayHandle:
        from swift_dist.runs.submission import write_submission

        if shutil.which("kubectl") is None:
            raise JobError(
                "--launcher",
                "kubectl is not installed here",
                "save the manifest that --dry-run prints, and `kubectl apply -f` it where it is",
            )
        submission = Submission("kuberay", name_of(job), job.launch.kuberay.namespace)
        assert job.output, "job.prepare() fills it"
        _make_room(submission, job.output)
        _run(_kubectl(submission.address, "create", "-f", "-"), self.render(job))
        write_submission(Path(job.output), asdict(submission))
        return KubeRayHandle(submission, Path(job.output))

    def attach(self, submission: Submission) -> KubeRayHandle:
        return KubeRayHandle(submission)


def _status_of(namespace: str, name: str) -> dict[str, Any] | None:
    """`status` of a RayJob as it stands; None if there is none of that name."""
    words = ("get", "rayjob", name, "--ignore-not-found", "-o", "json", "--request-timeout=30s")
    answer = _run(_kubectl(namespace, *words))
    return {"jobStatus": "", **(json.loads(answer).get("status") or {})} if answer.strip() else None


def _state_of(details: dict[str, Any]) -> State:
    state = STATES.get(details.get("jobStatus", ""), "waiting")
    failed = details.get("jobDeploymentStatus") == "Failed" and state in ("waiting", "running")
    return "failed" if failed else state


def _make_room(submission: Submission, run: str) -> None:
    """Take away the RayJob of an earlier attempt at the same run, which stays after its end.

    Raises:
        JobError: it has not ended: both would drive the run.
    """
    details = _status_of(submission.address, submission.id)
    if details is None:
        return
    if _state_of(details) in ("waiting", "running"):
        raise JobError(
            "output",
            f"{run} is RayJob {submission.id}'s, which has not ended",
            f"swift-dist runs logs {run} --follow shows it, swift-dist runs stop {run} ends it",
        )
    _run(_kubectl(submission.address, "delete", "rayjob", submission.id))  # waits until it is gone


def name_of(job: JobConfig) -> str:
    """A name that Kubernetes takes, the same for the same run folder: a run is never driven twice."""
    folder = Path(job.output or job.task)
    plain = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")[:30].strip("-") or "run"
    return f"{plain}-{zlib.crc32(str(folder).encode()):08x}"


def manifest(job: JobConfig) -> dict[str, Any]:
    """The RayJob as plain values.

    Raises:
        JobError: an option that the cluster cannot do without is missing.
    """
    options = job.launch.kuberay
    if not options.image:
        raise JobError("launch.kuberay.image", "no image given", "build one (docs/clusters.md), then name it")
    if bool(options.volume_claim) != bool(options.mount_path):
        raise JobError(
            "launch.kuberay.mount_path", "volume_claim and mount_path belong together", "give both, or neither"
        )
    ranks = job.cluster.nproc_per_node
    assert ranks, "job.prepare() fills it"
    gpus = 0 if job.cluster.accelerator == "cpu" else ranks
    cpus = max(options.cpus, math.ceil(job.cluster.cpus_per_rank * ranks))
    cluster = {
        "rayVersion": version("ray"),
        **({"authOptions": {"mode": "token"}} if options.token_auth else {}),
        # The driver runs on the head, ranks on workers only.
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": _pod(options, "ray-head", 2, "8Gi", 0)},
        "workerGroupSpecs": [
            {
                "groupName": "ranks",
                "replicas": job.cluster.nnodes,
                "minReplicas": job.cluster.nnodes,
                "maxReplicas": job.cluster.nnodes,
                "rayStartParams": {},
                "template": _pod(options, "ray-worker", cpus, options.memory, gpus),
            }
        ],
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": name_of(job),
            "namespace": options.namespace,
            "labels": {"app.kubernetes.io/managed-by": "swift-dist"},
        },
        "spec": {
            "entrypoint": command_line(_patient(job)),
            "runtimeEnvYAML": yaml.safe_dump({"env_vars": {"RAY_ADDRESS": "auto"}}),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": options.keep_seconds,
            "backoffLimit": 0,  # our own gang restarts ranks; a second driver would start over
            "rayClusterSpec": cluster,
        },
    }


def _patient(job: JobConfig) -> JobConfig:
    """The operator makes a new pod for a lost one: the run is to wait for it, unless the job says how long."""
    if "replacement_timeout" in job.cluster.model_fields_set:
        return job
    return job.model_copy(update={"cluster": job.cluster.model_copy(update={"replacement_timeout": _NEW_POD_SECONDS})})


def _pod(options: Options, name: str, cpus: int, memory: str, gpus: int) -> dict[str, Any]:
    resources: dict[str, Any] = {
        "cpu": str(cpus),
        "memory": memory,
        **({options.gpu_resource: str(gpus)} if gpus else {}),
    }
    mounts: list[dict[str, Any]] = [{"name": "shm", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": options.shm}}]
    if options.volume_claim:
        mounts.append({"name": "shared", "mountPath": options.mount_path})
        volumes.append({"name": "shared", "persistentVolumeClaim": {"claimName": options.volume_claim}})
    container = {
        "name": name,
        "image": options.image,
        "resources": {"requests": resources, "limits": resources},
        "volumeMounts": mounts,
    }
    spec: dict[str, Any] = {"containers": [container], "volumes": volumes, "terminationGracePeriodSeconds": 60}
    if name == "ray-worker":
        spec |= {"nodeSelector": options.node_selector} if options.node_selector else {}
        spec |= {"tolerations": list(options.tolerations)} if options.tolerations else {}
    if options.service_account:
        spec["serviceAccountName"] = options.service_account
    return {"spec": spec}


def _kubectl(namespace: str, *words: str) -> list[str]:
    return ["kubectl", "-n", namespace, *words]


def _run(words: list[str], text: str | None = None) -> str:
    try:
        done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise JobError("--launcher", "kubectl is not installed here", "install it, or run this where it is") from None
    if done.returncode:
        raise RunError(f"{' '.join(words[:5])} failed: {done.stderr.strip()}", "see to the cluster's answer above")
    return done.stdout


LAUNCHER = KubeRayLauncher()
