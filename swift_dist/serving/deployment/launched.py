"""A deployment that a launcher sends elsewhere, and what is asked of it later from another machine.

`submit` hands `swift-dist deploy` over with absolute paths. Its folder notes the submission (submission.json). The
control API listens on the loopback of the machine where the deployment runs, so a change that is typed elsewhere is
carried there by the same launcher: as a job step of Slurm, as another Ray job.
"""

from __future__ import annotations

import json
import math
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_dist import plugins
from swift_dist.config.job import ClusterSection
from swift_dist.config.section import updated
from swift_dist.errors import JobError, RunError
from swift_dist.launchers._base import Submission, Work, raise_told, words_of
from swift_dist.serving.deployment.folder import DeploymentFolder, default_folder
from swift_dist.serving.deployment.own_options import with_paths
from swift_dist.serving.deployment.plan import bounds_of, require_roots

if TYPE_CHECKING:
    from swift_dist.serving.deploy import DeployOptions

FILES = ("api_keys", "admin_keys", "chat_template", "hf_config")
MODELS = ("model", "tokenizer", "follow", "update")
"""Keys that name a folder or, as a rule, a hub id."""
OTHER_PATHS = ("cache", "output")
NAMED = ("adapters", "models", "load_adapter")
"""Keys of ``name=PATH``; of adapters the name may be missing."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_OF_SLURM = ("nnodes", "nproc_per_node")


def submit(options: DeployOptions) -> dict[str, Any]:
    """Send a deployment elsewhere, or with `--dry-run` show what would be sent.

    Returns:
        ``state``, ``folder``, ``submission`` and ``message``; of a dry run ``artefact``.

    Raises:
        JobError: the keys are wrong, the launcher takes no deployments, or the system that it hands them to refuses.
            Nothing has begun. RunError: the deployment failed, where its end was waited for.
        KeyboardInterrupt: this terminal left it; it goes on.
    """
    launcher = _launcher(options)
    work = prepare(options)
    if options.dry_run:
        artefact = launcher.render(work)
        return {"plan": artefact.rstrip("\n"), "artefact": artefact, "folder": work.output}
    result = launcher.submit(work).wait()
    if "submission" not in result:
        return result  # what `deploy` itself returned, where it ran
    noted = result["submission"]
    lines = [f"{result['state']} as {noted['id']} of {noted['launcher']}", f"folder: {work.output}"]
    if result["state"] in ("waiting", "running"):
        lines.append(f"what it does: swift-dist deploy --status --output {work.output}")
    lines.append(f"what it said: swift-dist runs logs {work.output}")
    return {"state": result["state"], "folder": work.output, "submission": noted, "message": "\n".join(lines)}


def _launcher(options: DeployOptions) -> Any:
    try:
        launcher = plugins.find("swift_dist.launchers", options.launcher, "LAUNCHER")
    except plugins.UnknownPlugin as error:
        hint = (error.suggestions or error.known)[0]
        raise JobError("launcher", str(error), f"--launcher {hint}") from None
    reason = getattr(launcher, "no_deployments", "it takes training jobs only")
    if reason:
        raise JobError(
            "launcher",
            f"{options.launcher} takes no deployments: {reason}",
            "--launcher slurm, or --launcher ray on a cluster that runs (also one of KubeRay)",
        )
    return launcher


def prepare(options: DeployOptions) -> Work:
    """The deployment as it is sent: what can be seen from here is checked, every path absolute, its folder named.

    Raises:
        JobError: it cannot run as asked.
    """
    bounds_of(options)
    _require_keys(options)
    if options.launcher == "ray":
        options = _at_dashboard(options)
    elif options.address:
        problem = f"{options.launcher} brings a Ray cluster of its own"
        raise JobError("address", problem, "leave it out, or --launcher ray for that cluster")
    _require_own_launch_keys(options)
    require_roots(options)
    options = with_absolute_paths(options.model_copy(update={"output": options.output or str(default_folder())}))
    adds_host = options.launcher == "slurm" and "host" not in options.model_fields_set
    if not adds_host and options.host in _LOOPBACK:
        pass  # who can reach it shares that node
    elif not (options.api_keys or options.api_keys_variable):
        raise JobError(
            "api_keys",
            "is not given: whoever reaches the node could use the model",
            "(umask 077; openssl rand -hex 32 >keys), and --api_keys keys; or --host 127.0.0.1",
        )
    assert options.output
    folder = DeploymentFolder(options.output)
    if folder.runs():
        raise JobError("output", f"a deployment runs in {folder.path}", "--output another folder, or --stop it first")
    words = words_of(options.model_copy(update={"launch": type(options.launch)()}), {"launcher", "dry_run", *_OF_SLURM})
    cluster = _cluster(options)
    return Work("deploy", tuple(words), options.output, cluster, options.launch, is_service=True, adds_host=adds_host)


def _require_keys(options: DeployOptions) -> None:
    from swift_dist.serving.front.keys import keys_of_file

    if not (options.model or options.models or options.follow):
        raise JobError("model", "is not given", "--model PATH_OR_RUN")
    for key in ("api_keys", "admin_keys"):
        if path := getattr(options, key):
            keys_of_file(key, path)


def _at_dashboard(options: DeployOptions) -> DeployOptions:
    """`--address` names the cluster, here by the address of its dashboard, which takes jobs."""
    if options.address is None:
        return options
    if options.launch.ray.address:
        raise JobError("address", "is given beside --launch.ray.address", "leave one of them out")
    ray = updated(options.launch.ray, address=options.address)
    return options.model_copy(update={"address": None, "launch": options.launch.model_copy(update={"ray": ray})})


def _require_own_launch_keys(options: DeployOptions) -> None:
    """No key is accepted that nothing would read."""
    for name in type(options.launch).model_fields:
        if name != options.launcher and getattr(options.launch, name).model_fields_set:
            raise JobError(f"launch.{name}", f"is not read with --launcher {options.launcher}", "leave it out")
    given = options.model_fields_set
    if options.launcher != "slurm" and (wrong := next((key for key in _OF_SLURM if key in given), None)):
        raise JobError(
            wrong, "is of --launcher slurm: on a Ray cluster replicas go where there is room", "leave it out"
        )
    if options.launcher == "slurm":
        slurm = options.launch.slurm
        for key in ("requeue", "max_restarts"):
            if key in slurm.model_fields_set and getattr(slurm, key):
                problem = "a deployment does not go back into the queue"
                raise JobError(f"launch.slurm.{key}", problem, "a job that follows it: slurm/serve.sbatch says how")


def _cluster(options: DeployOptions) -> ClusterSection:
    """The nodes that a deployment needs, in the words of a job: a rank is a device of a replica.

    Raises:
        JobError: `nproc_per_node` devices are too few for the replicas of a node.
    """
    bounds = bounds_of(options)
    num_models = len(options.models) + bool(options.model or options.follow)
    replicas = num_models * (bounds.most if bounds else options.replicas)
    devices = options.tensor_parallel_size * options.pipeline_parallel_size
    least = math.ceil(replicas / options.nnodes) * devices
    nproc_per_node = options.nproc_per_node or least
    if nproc_per_node // devices * options.nnodes < replicas:
        raise JobError(
            "nproc_per_node",
            f"{nproc_per_node} devices of {options.nnodes} nodes are too few for {replicas} replicas of {devices}",
            f"--nproc_per_node {least}, or more --nnodes",
        )
    return ClusterSection(
        nnodes=options.nnodes,
        nproc_per_node=nproc_per_node,
        accelerator=options.accelerator,
        cpus_per_rank=(options.cpus_per_replica or devices) / devices,
    )


def with_absolute_paths(options: DeployOptions) -> DeployOptions:
    """Another machine has another working directory.

    Raises:
        JobError: a file or folder is not there.
    """
    changes: dict[str, Any] = {}
    for key in (*FILES, *MODELS, *OTHER_PATHS):
        if value := getattr(options, key):
            changes[key] = _absolute(key, value)
    for key in NAMED:
        value = getattr(options, key)
        if value:
            changes[key] = _named(key, value) if isinstance(value, str) else tuple(_named(key, word) for word in value)
    changes["model_options"] = with_paths(options.model_options, lambda path: _absolute("chat_template", path))
    if options.adapter_root:
        changes["adapter_root"] = tuple(str(Path(root).absolute()) for root in options.adapter_root)
    return options.model_copy(update=changes)


def _named(key: str, word: str) -> str:
    name, equals, path = word.partition("=")
    if not equals:
        return _absolute(key, word) if key == "adapters" else word  # the others are refused where they are read
    return f"{name}={_absolute(key, path)}"


def _absolute(key: str, given: str) -> str:
    path = Path(given).expanduser()
    if path.exists() or key in OTHER_PATHS:
        return str(path.absolute())
    is_hub_id = given.partition("@")[0].count("/") == 1 and not given.startswith(("/", ".", "~"))
    if key in FILES or key == "follow" or not is_hub_id:
        raise JobError(key, f"there is no {given} on this machine", "name what every node sees under the same path")
    return given


@dataclass(frozen=True)
class Elsewhere:
    """A deployment that a launcher sent to another machine than this one, or that has not begun."""

    folder: DeploymentFolder
    submission: Submission
    handle: Any


def find(options: DeployOptions) -> Elsewhere | None:
    """The deployment that a change is about where it cannot be asked from here; None: it can, or nobody sent it."""
    if options.output is None or "launcher" in options.model_fields_set:
        return None
    from swift_dist.runs.submission import read_submission

    folder = DeploymentFolder(options.output)
    noted = read_submission(folder.path)
    if noted is None or (folder.runs() and folder.exists() and folder.read().get("host") == socket.gethostname()):
        return None
    launcher = plugins.find("swift_dist.launchers", noted["launcher"], "LAUNCHER")
    submission = Submission(noted["launcher"], noted["id"], noted["address"])
    return Elsewhere(folder, submission, launcher.attach(submission))


def change(there: Elsewhere, options: DeployOptions, asked: str) -> dict[str, Any]:
    """Have a change made on the machine where the deployment runs; what it returned there.

    Raises:
        JobError, RunError: what it raised there; the deployment does not run.
    """
    state, name = there.handle.status(), f"{there.submission.launcher} {there.submission.id}"
    path = there.folder.path
    if state == "waiting" and asked == "stop":
        there.handle.stop()
        return {"folder": str(path), "message": f"cancelled {name}; it had not begun"}
    if state == "waiting":
        raise RunError(f"the deployment in {path} has not begun: {name} waits", "try again when it has")
    if state != "running":
        raise JobError("output", f"the deployment in {path} has ended: {name} is {state}", "start it again")
    options = with_absolute_paths(options)
    code, text = there.handle.run_beside(_command(there, words_of(options)))
    result = _last_json(text)
    if result is None:
        said = "\n".join(text.strip().splitlines()[-5:])
        raise RunError(f"{name}: the command ended there with exit code {code} and no answer", said)
    if "error" in result:
        raise_told(result)
    return result


def _command(there: Elsewhere, words: list[str]) -> list[str]:
    """``--launcher local``: there it is to ask the control API itself."""
    # Slurm's step has no environment of ours around it; a Ray job has the cluster's.
    program = [sys.executable, "-m", "swift_dist.cli"] if there.submission.launcher == "slurm" else ["swift-dist"]
    return [*program, "deploy", *words, "--launcher", "local", "--json"]


def _last_json(text: str) -> dict[str, Any] | None:
    """The object that `--json` printed last, among lines of a log."""
    position = ("\n" + text).rfind("\n{")
    while position >= 0:
        try:
            value, _ = json.JSONDecoder().raw_decode(text[position:])
        except ValueError:
            position = ("\n" + text).rfind("\n{", 0, position)
            continue
        return value if isinstance(value, dict) else None
    return None
