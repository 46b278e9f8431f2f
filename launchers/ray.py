"""The Ray launcher: the job goes to a Ray cluster as a Ray job and runs there without this process.

Ports: Ray's own are the cluster's. The ranks' store is bound to port 0 by rank 0, which tells the others.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import secrets
import shlex
import socket
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from swift_dist.config.section import Section
from swift_dist.errors import JobError
from swift_dist.launchers._base import Submission, Where, Work
from swift_dist.launchers._ray_client import RayJobs, UnknownJob, Unreachable, resolve_address
from swift_dist.launchers._ray_handle import RayHandle
from swift_dist.launchers._ray_room import require_room
from swift_dist.launchers._upload import Collection, collect, pack

if TYPE_CHECKING:
    from swift_dist.config import JobConfig

log = logging.getLogger(__name__)


class Options(Section):
    address: str | None = Field(
        None, description="http://HOST:8265 of the cluster's dashboard (default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS)"
    )
    upload: bool = Field(True, description="send the working folder along; its code is imported before the nodes' own")
    working_dir: str = Field(".", description="the folder that is sent")
    excludes: tuple[str, ...] = Field((), description="patterns of what is not sent, as in a .gitignore")
    max_file_size: float = Field(10.0, gt=0, description="MiB; larger files are not sent")
    max_upload_size: float = Field(100.0, gt=0, description="MiB of all files; more is refused")
    runtime_env: dict[str, Any] = Field({}, description="more of Ray's runtime_env, such as pip or env_vars")
    pass_env: tuple[str, ...] = Field(
        (), description="variables of this terminal that go along, such as HF_TOKEN or NCCL_*"
    )
    entrypoint_num_cpus: float = Field(0, ge=0, description="CPUs kept for the job's driver")
    entrypoint_num_gpus: float = Field(0, ge=0, description="GPUs kept for it")
    entrypoint_memory: int = Field(0, ge=0, description="bytes of memory kept for it")
    entrypoint_resources: dict[str, float] = Field({}, description="custom resources that its node must have")
    metadata: dict[str, str] = Field({}, description="more notes that Ray keeps with the job")
    check_versions: bool = Field(True, description="refuse nodes with other versions than this machine's")
    follow: bool = Field(True, description="show what the job prints and wait for its end; else return at once")
    stop_timeout: int = Field(300, gt=0, description="seconds for a checkpoint after a stop, before it is killed")
    reconnect_timeout: float = Field(600.0, gt=0, description="seconds to look for a cluster that no longer answers")


class RayLauncher:
    """Through the job server of a cluster's dashboard."""

    where: Where = "elsewhere"
    no_deployments = ""

    def render(self, job: JobConfig | Work) -> str:
        work = Work.of(job)
        options = work.launch.ray
        runtime_env = self._runtime_env(options)
        words = ["ray", "job", "submit", "--address", resolve_address(options.address), "--no-wait"]
        if options.upload:
            folder = Path(options.working_dir).absolute()
            words += ["--working-dir", str(folder)]
            left_out = [f"/{name}" for name in _collected(options).left_out]
            runtime_env["excludes"] = [*options.excludes, *left_out]
        words += ["--runtime-env-json", json.dumps(runtime_env), "--metadata-json", json.dumps(_metadata(work))]
        for name, value in _entrypoint(options).items():
            given = f"{value:g}" if isinstance(value, float) else json.dumps(value)
            words += [f"--{name.replace('_', '-')}", given]
        return f"{shlex.join(words)} -- {_command(work)}"

    def submit(self, job: JobConfig | Work) -> RayHandle:
        """
        Raises:
            JobError: no cluster answers, it does not take our token, or it can never place the job. Nothing has begun.
        """
        work = Work.of(job)
        options = work.launch.ray
        address = resolve_address(options.address)
        run = Path(work.output)
        try:
            jobs = RayJobs(address)
            self._require_new(run)
            _require_same_ray(jobs, options)
            require_room(work, jobs.nodes())
            return self._submit(work, jobs, run)
        except Unreachable as error:
            raise JobError(
                "launch.ray.address",
                str(error),
                "ray start --head --dashboard-host=0.0.0.0 serves it; it must be reachable from here",
            ) from None

    def attach(self, submission: Submission) -> RayHandle:
        return RayHandle(submission)

    def _submit(self, work: Work, jobs: RayJobs, run: Path) -> RayHandle:
        from swift_dist.runs.submission import read_submission, remove_submission, write_submission

        options = work.launch.ray
        submission = Submission(
            "ray", f"swift_dist-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(3)}", jobs.address
        )
        runtime_env = self._runtime_env(options)
        with tempfile.TemporaryDirectory(prefix="swift_dist-") as scratch:
            if options.upload and (files := _collected(options)).files:
                if warning := files.warning():
                    log.warning("%s", warning)
                archive = Path(scratch) / "working_dir.zip"
                pack(files, archive)
                log.info("sending %d files, %.1f MiB", len(files.files), archive.stat().st_size / 2**20)
                runtime_env["working_dir"] = str(archive)
            write_submission(run, asdict(submission))  # first: whatever happens now, the job can be found again
            attempts = (read_submission(run) or {}).get("attempts", 0)
            try:
                jobs.submit(
                    entrypoint=_command(work),
                    submission_id=submission.id,
                    runtime_env=runtime_env,
                    metadata=_metadata(work),
                    **_entrypoint(options),
                )
            except Exception:
                remove_submission(run)
                raise
        log.info("submitted as %s to %s", submission.id, jobs.address)
        return RayHandle(
            submission,
            run,
            attempts=attempts,
            follow=options.follow,
            is_service=work.is_service,
            reconnect_timeout=options.reconnect_timeout,
        )

    def _require_new(self, run: Path) -> None:
        """Refuse a run folder whose job was submitted before and has not ended."""
        from swift_dist.runs.submission import read_submission

        noted = read_submission(run)
        if not noted or noted.get("launcher") != "ray":
            return
        with contextlib.suppress(UnknownJob, Unreachable):
            state = self.attach(Submission("ray", noted["id"], noted["address"])).status()
            if state in ("waiting", "running"):
                raise JobError(
                    "output",
                    f"{run} was submitted as {noted['id']}, which is {state}",
                    f"swift-dist runs logs {run} --follow shows it, swift-dist runs stop {run} ends it",
                )

    def _runtime_env(self, options: Options) -> dict[str, Any]:
        from swift_dist.cluster.environment import matches
        from swift_dist.cluster.versions import VARIABLE, expected

        if "working_dir" in options.runtime_env:
            raise JobError("launch.ray.runtime_env", "working_dir is sent by upload", "--launch.ray.working_dir FOLDER")
        env = {
            "RAY_JOB_STOP_WAIT_TIME_S": str(options.stop_timeout),  # Ray's default, 3 s, saves no checkpoint
            **({VARIABLE: expected()} if options.check_versions else {}),
            **{name: value for name, value in os.environ.items() if matches(name, options.pass_env)},
            **options.runtime_env.get("env_vars", {}),
        }
        return {**options.runtime_env, "env_vars": env}


def _command(work: Work) -> str:
    """What runs on the cluster; its Ray puts RAY_ADDRESS, and its nodes their token, into the environment.

    Ray gives it to a shell. `exec`: a stop in the moment in which that shell forks would end the shell alone, Ray would
    call the job stopped, and the driver would train on (seen with Ray 2.60).
    """
    return f"exec {shlex.join(work.command)}"


def _metadata(work: Work) -> dict[str, str]:
    from swift_dist import __version__

    return {
        "task": work.verb,
        "output": work.output,
        "swift_dist": __version__,
        "submitted_by": f"{getpass.getuser()}@{socket.gethostname()}",
        **work.launch.ray.metadata,
    }


def _entrypoint(options: Options) -> dict[str, Any]:
    """What is kept for the driver, as far as anything was asked for."""
    names = ("entrypoint_num_cpus", "entrypoint_num_gpus", "entrypoint_memory", "entrypoint_resources")
    return {name: getattr(options, name) for name in names if getattr(options, name)}


def _collected(options: Options) -> Collection:
    return collect(
        Path(options.working_dir).absolute(),
        excludes=options.excludes,
        max_file_size=options.max_file_size,
        max_size=options.max_upload_size,
    )


def _require_same_ray(jobs: RayJobs, options: Options) -> None:
    import ray

    theirs = jobs.ray_version()
    if options.check_versions and theirs != ray.__version__:
        raise JobError(
            "launch.ray.check_versions",
            f"the cluster runs Ray {theirs}, this machine has {ray.__version__}",
            f"pip install ray=={theirs} here, or --launch.ray.check_versions false to try all the same",
        )


LAUNCHER = RayLauncher()
