"""The Slurm launcher: the job becomes a batch script with a Ray cluster over its nodes (slurm/ray_cluster.sh).

Ports: 32 of the band (`launch.slurm.ports`) for Ray, by the job's id: those with ids less than 250 apart never meet.
Ray's workers use ports that the kernel finds free (RAY_CLUSTER_WORKER_PORTS names a range), and so do the ranks: rank 0
binds port 0 and tells the others.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import logging
import math
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from swift_dist.config.section import Section
from swift_dist.errors import JobError, RunError
from swift_dist.launchers._base import Submission, Where, Work
from swift_dist.launchers._slurm_handle import SlurmHandle, slurm

if TYPE_CHECKING:
    from swift_dist.config import JobConfig

log = logging.getLogger(__name__)

Text = Annotated[str, Field(pattern=r"^[^\r\n]+$")]
"""One line: it goes into a line of the script."""
Size = Annotated[str, Field(pattern=r"^\d+[KMGT]?$", coerce_numbers_to_str=True)]

PORTS = range(24000, 32000)
"""The band that jobs share where `launch.slurm.ports` names no other; each takes 32 of it, by its id."""
PORTS_OF_A_JOB = 32

ADD_HOST = """bash -c 'exec "$@" --host "${RAY_ADDRESS%:*}"' deploy"""
"""Before the words of a deployment, which then listens at the address of the job's first node: the one that the nodes'
Ray talks to. slurm/serve.sbatch does the same."""

OWN_WORDS = {
    "--nodes": "cluster.nnodes says it",
    "-N": "cluster.nnodes says it",
    "--output": "launch.slurm.log_folder says it",
    "-o": "launch.slurm.log_folder says it",
    "--array": "its tasks would share one run folder; slurm/pretrain.sbatch gives each its own",
    "-a": "its tasks would share one run folder; slurm/pretrain.sbatch gives each its own",
}
"""sbatch options that `launch.slurm.sbatch` may not hold, and why."""


class Options(Section):
    partition: Text | None = Field(None, description="partition, or several with commas")
    account: Text | None = Field(None, description="account that is charged")
    qos: Text | None = Field(None, description="quality of service")
    constraint: Text | None = Field(None, description="features that the nodes must have")
    time: Text | None = Field(None, description="limit as Slurm writes it: minutes, H:M:S or D-H (quote it in YAML)")
    gres: str | None = Field(
        None, pattern=r"^[^\r\n]*$", description="GPUs of a node (default: gpu:<ranks>, none on cpu; '' asks for none)"
    )
    cpus_per_task: int | None = Field(None, gt=0, description="CPUs of a node (default: cluster.cpus_per_rank x ranks)")
    mem: Size | None = Field(None, description="memory of a node, e.g. 500G; 0 is all of it")
    exclusive: bool = Field(False, description="share the nodes with no other job")
    job_name: Text | None = Field(None, description="(default: swift_dist-<name of the run folder>)")
    dependency: Text | None = Field(None, description="what to wait for, e.g. afterok:123")
    requeue: bool = Field(
        True, description="checkpoint, wait in the queue and resume: near the time limit, preempted, or a node is lost"
    )
    max_restarts: int = Field(10, ge=0, description="requeues of the job, whatever their cause")
    signal_seconds: int = Field(120, ge=10, description="before the time limit, when the checkpoint is asked for")
    stop_timeout: int = Field(600, gt=0, description="seconds for that checkpoint, before the job is ended without")
    join_timeout: int = Field(180, gt=0, description="seconds for all nodes to join the job's Ray cluster")
    ports: str = Field(
        f"{PORTS[0]}-{PORTS[-1]}",
        pattern=r"^\d+-\d+$",
        description="band that jobs share; a job takes 32 of it by its id",
    )
    interface: Text | None = Field(None, description="network interface, e.g. ib0 (default: of the nodes' addresses)")
    container_image: Text | None = Field(None, description="image that everything runs in")
    container_runtime: Literal["pyxis", "apptainer"] = Field("pyxis", description="what runs the image")
    container_mounts: tuple[Text, ...] = Field((), description="FOLDER[:FOLDER_INSIDE] to see inside the container")
    setup: tuple[Text, ...] = Field((), description="shell lines to run first, such as 'module load cuda'")
    sbatch: tuple[Text, ...] = Field((), description="more options of sbatch, e.g. --exclude=n7")
    log_folder: str | None = Field(None, description="(default: the folder slurm in the run folder)")
    follow: bool = Field(True, description="show what the job prints and wait for its end; else return at once")


class SlurmLauncher:
    """Through sbatch. The job is driven on its first node and goes on without this process."""

    where: Where = "elsewhere"
    no_deployments = ""

    def render(self, job: JobConfig | Work) -> str:
        work = Work.of(job)
        _check(work)
        options, folder = work.launch.slurm, _log_folder(work)
        parts = [
            "#!/usr/bin/env bash",
            f"# {work.verb} into {work.output}, rendered by swift-dist. By hand:",
            f"#     mkdir -p {shlex.quote(str(folder))} && sbatch THIS_FILE",
            *_directives(work),
            "",
            *options.setup,
            *(
                []
                if options.container_image
                else [f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"]
            ),
            *_settings(work),
            "",
            ray_cluster().rstrip(),
            "",
            f'ray_cluster_run {_command(work)} >"$RAY_CLUSTER_LOGS/result.json"',
        ]
        return "\n".join(parts) + "\n"

    def submit(self, job: JobConfig | Work) -> SlurmHandle:
        """
        Raises:
            JobError: no Slurm is here, it refuses the job, or the run folder is a waiting job's. Nothing has begun.
        """
        from swift_dist.runs.submission import write_submission

        work = Work.of(job)
        script = self.render(work)
        run, folder = Path(work.output), _log_folder(work)
        self._require_new(run)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "job.sbatch"
        file.write_text(script)
        try:
            number = slurm("sbatch", "--parsable", str(file)).split(";")[0].strip()
        except (JobError, RunError) as error:
            file.unlink()
            with contextlib.suppress(OSError):  # not empty: of earlier jobs
                folder.rmdir()
                run.rmdir()
            if isinstance(error, JobError):
                raise
            raise JobError("launch.slurm", error.message, "launch.slurm.* are the options that sbatch got") from None
        submission = Submission("slurm", number, str(folder / f"{number}.log"))
        write_submission(run, asdict(submission))
        log.info("submitted as Slurm job %s; its output: %s", number, submission.address)
        return SlurmHandle(submission, run, follow=work.launch.slurm.follow)

    def attach(self, submission: Submission) -> SlurmHandle:
        return SlurmHandle(submission)

    def _require_new(self, run: Path) -> None:
        """Refuse a run folder whose Slurm job has not ended: both would resume it."""
        from swift_dist.runs.submission import read_submission

        noted = read_submission(run)
        if not noted or noted.get("launcher") != "slurm":
            return
        with contextlib.suppress(RunError):  # Slurm has forgotten it
            state = self.attach(Submission("slurm", noted["id"], noted["address"])).status()
            if state in ("waiting", "running"):
                raise JobError(
                    "output",
                    f"{run} is Slurm job {noted['id']}'s, which is {state}",
                    f"swift-dist runs logs {run} --follow shows it, swift-dist runs stop {run} ends it",
                )


def ray_cluster() -> str:
    """The text of slurm/ray_cluster.sh."""
    return importlib.resources.files("swift_dist").joinpath("slurm", "ray_cluster.sh").read_text(encoding="utf-8")


def _check(work: Work) -> None:
    options = work.launch.slurm
    if work.cluster.address:
        raise JobError(
            "cluster.address",
            "a job in Slurm brings its own Ray cluster",
            "leave it out, or --launcher ray for that cluster",
        )
    band(work)
    least = _cpus(work)
    what, key = ("devices", "cpus_per_replica") if work.is_service else ("ranks", "cluster.cpus_per_rank")
    if options.cpus_per_task and options.cpus_per_task < least:
        raise JobError(
            "launch.slurm.cpus_per_task",
            f"{options.cpus_per_task}, but {work.cluster.nproc_per_node} {what} with "
            f"{work.cluster.cpus_per_rank:g} CPUs ({key}) need {least}",
            f"--launch.slurm.cpus_per_task {least}",
        )
    for word in options.sbatch:
        name = word.partition("=")[0].split()[0]
        if not name.startswith("-"):
            raise JobError("launch.slurm.sbatch", f"{word!r} is no option", "one list entry an option: --exclude=n7")
        if name in OWN_WORDS:
            raise JobError("launch.slurm.sbatch", f"{name}: {OWN_WORDS[name]}", "leave it out")


def band(work: JobConfig | Work) -> range:
    """Ports that jobs of this site share.

    Raises:
        JobError: they are too few, or none.
    """
    first, last = map(int, work.launch.slurm.ports.split("-"))
    if not 0 < first <= last - PORTS_OF_A_JOB + 1 <= 65535 - PORTS_OF_A_JOB + 1:
        raise JobError(
            "launch.slurm.ports",
            f"{work.launch.slurm.ports} is no band of {PORTS_OF_A_JOB} ports or more, up to 65535",
            f"--launch.slurm.ports {PORTS[0]}-{PORTS[-1]}",
        )
    return range(first, last + 1)


def _cpus(work: Work) -> int:
    assert work.cluster.nproc_per_node
    return math.ceil(work.cluster.cpus_per_rank * work.cluster.nproc_per_node)


def _directives(work: Work) -> list[str]:
    """The #SBATCH lines."""
    options, folder = work.launch.slurm, _log_folder(work)
    gres = options.gres
    if gres is None:
        gres = "" if work.cluster.accelerator == "cpu" else f"gpu:{work.cluster.nproc_per_node}"
    given = {
        "job-name": options.job_name or f"swift_dist-{Path(work.output).name}",
        "nodes": str(work.cluster.nnodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(options.cpus_per_task or _cpus(work)),
        "gres": gres,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "time": options.time,
        "mem": options.mem,
        "dependency": options.dependency,
        # at USR1 ray_cluster.sh puts the job back into the queue once it has ended
        "signal": f"B:{'TERM' if work.is_service else 'USR1'}@{options.signal_seconds}",
        "chdir": str(Path.cwd()),
        "output": f"{folder}/%j.log",
        "open-mode": "append",
    }
    words = [f"--{name}={shlex.quote(value)}" for name, value in given.items() if value]
    words.append("--requeue" if _goes_back(work) else "--no-requeue")
    words += ["--exclusive"] if options.exclusive else []
    words += ["--kill-on-invalid-dep=yes"] if options.dependency else []  # else it would wait for ever
    return [f"#SBATCH {word}" for word in [*words, *options.sbatch]]


def _settings(work: Work) -> list[str]:
    """What ray_cluster.sh reads. All of it: nothing of the submitter's environment is to decide."""
    options = work.launch.slurm
    mounts = [work.output, *options.container_mounts]
    settings = {
        "PORTS": options.ports,
        "WORKER_PORTS": "",
        "INTERFACE": options.interface or "",
        "JOIN_SECONDS": options.join_timeout,
        "MAX_RESTARTS": options.max_restarts if _goes_back(work) else 0,
        "STOP_SECONDS": options.stop_timeout,
        "DASHBOARD": str(work.cluster.dashboard).lower(),
        "GPUS": "0" if work.cluster.accelerator == "cpu" else "",
        "IMAGE": options.container_image or "",
        "RUNTIME": options.container_runtime,
        "MOUNTS": ",".join(mounts) if options.container_image else "",
    }
    lines = [f"RAY_CLUSTER_{name}={shlex.quote(str(value))}" for name, value in settings.items()]
    return [f'RAY_CLUSTER_LOGS={shlex.quote(str(_log_folder(work)))}/"$SLURM_JOB_ID".d', *lines]


def _log_folder(work: Work) -> Path:
    folder = work.launch.slurm.log_folder
    return Path(folder).absolute() if folder else Path(work.output) / "slurm"


def _goes_back(work: Work) -> bool:
    return work.launch.slurm.requeue and not work.is_service


def _command(work: Work) -> str:
    """What runs on the first node; ray_cluster.sh says where its Ray cluster is."""
    line = f"{shlex.join(work.command)} --json"
    return f"{ADD_HOST} {line}" if work.adds_host else line


LAUNCHER = SlurmLauncher()
