"""`swift-dist deploy`: an OpenAI API for models, and the same word for what is changed while it runs.

With `--model` a deployment starts: in the foreground, or with `--launcher` elsewhere. With one of `--update`,
`--promote`, `--rollback`, `--status`, `--stop`, `--load_adapter` and `--unload_adapter` a running one is asked, which
is found by `--output`.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from swift_dist.config.launch import DeploymentLaunchSection
from swift_dist.errors import JobError
from swift_dist.serving.deployment.scaling import ScaleOptions
from swift_dist.serving.deployment.status import render_status
from swift_dist.serving.front.options import FrontOptions
from swift_dist.serving.options import EngineOptions
from swift_dist.serving.sources.source import SourceOptions

_NOT = "leave it out; it is for the start of one"


class DeployOptions(FrontOptions, ScaleOptions, EngineOptions, SourceOptions):
    models: tuple[str, ...] = Field((), description="more models behind the same address: name=MODEL, several")
    model_options: tuple[str, ...] = Field(
        (), description="keys of an engine for one of the models: NAME.KEY=VALUE, several (embed.task=embed)"
    )
    served_model_name: str | None = Field(
        None, description="what requests call --model (default: its folder's name); of several, the one to change"
    )
    replicas: int = Field(1, ge=1, description="replicas of each model")
    cpus_per_replica: float | None = Field(
        None, gt=0, description="logical CPUs that a replica asks of Ray (default: its share of this machine, or 1)"
    )
    adapter_root: tuple[str, ...] = Field(
        (), description="folders below which adapters may be loaded while it runs (also: those that --adapters names)"
    )
    address: str | None = Field(None, description="Ray cluster to run on (default: RAY_ADDRESS, else one of its own)")
    launcher: str = Field(
        "local",
        description="where it runs: local (here, or on --address), ray (on a cluster, as a Ray job), slurm (as a batch "
        "job); with a change: local asks from this machine even if the deployment was sent elsewhere",
    )
    nnodes: int = Field(1, ge=1, description="nodes of the batch job (--launcher slurm)")
    nproc_per_node: int | None = Field(
        None,
        ge=1,
        description="devices of each of them that replicas get (default: as many as they need; an update needs twice "
        "as many)",
    )
    output: str | None = Field(None, description="folder of the deployment (default: runs/deploy-<time>; the newest)")
    follow: str | None = Field(
        None, description="folder of a training run, each of whose new checkpoints replaces the model"
    )
    dry_run: bool = Field(False, description="print what would be started; start nothing")
    update: str | None = Field(None, description="replace a running deployment's model by this one, request by request")
    canary: float | None = Field(None, gt=0, lt=1, description="with update: the new version's share of the requests")
    surge: int | None = Field(
        None,
        ge=0,
        description="with update, promote, rollback and follow: replicas that there may be more meanwhile, for a "
        "cluster without room for twice as many (0: an old one ends before each new one starts)",
    )
    wait_timeout: float | None = Field(
        None,
        gt=0,
        description="seconds that update, promote, rollback and stop wait at most for what they have begun, which "
        "goes on (default: until it is done)",
    )
    promote: bool = Field(False, description="give the canary all requests")
    rollback: bool = Field(False, description="go back: without the canary, or to the version before")
    status: bool = Field(False, description="show what a running deployment does")
    stop: bool = Field(False, description="end a running deployment; requests that run are answered")
    load_adapter: str | None = Field(None, description="name=DIR: load an adapter into a running deployment")
    unload_adapter: str | None = Field(None, description="name of an adapter that a running deployment is to forget")
    launch: DeploymentLaunchSection = DeploymentLaunchSection()


# What each change of a running deployment may be told beside itself.
_FINDS = frozenset({"output", "launcher"})
_REPLACES = _FINDS | {"served_model_name", "surge", "wait_timeout"}
_CHANGES: dict[str, frozenset[str]] = {
    "update": _REPLACES | {"canary", "hf_config", "tokenizer", "cache", "merge_lora"},
    "promote": _REPLACES,
    "rollback": _REPLACES,
    "status": _FINDS,
    "stop": _FINDS | {"wait_timeout"},
    "load_adapter": _FINDS | {"served_model_name"},
    "unload_adapter": _FINDS,
}


def deploy(options: DeployOptions) -> dict[str, Any]:
    """Start a deployment and stay until it is stopped, send it elsewhere, or change one that runs.

    Raises:
        JobError: something is wrong with the keys, the model, or this machine; nothing was started.
        RunError: it failed later.
    """
    change = _change(options)
    if change is not None:
        from swift_dist.serving.deployment import changes, launched

        if (there := launched.find(options)) is not None:
            return launched.change(there, options, change)
        return getattr(changes, change)(options)
    if options.launcher != "local":
        from swift_dist.serving.deployment import launched

        return launched.submit(options)
    require_local(options)
    from swift_dist.serving.deployment.plan import describe, make_plan

    plan = make_plan(options)
    if options.dry_run:
        return describe(plan)
    from swift_dist.serving.deployment.driver import serve

    return serve(plan)


def require_local(options: DeployOptions) -> None:
    """Raises JobError for keys that only launchers read."""
    given = options.model_fields_set & {"nnodes", "nproc_per_node", "launch"}
    if given:
        raise JobError(min(given), "is read with --launcher slurm or ray only", "add --launcher, or leave it out")


def _change(options: DeployOptions) -> str | None:
    """The one change that is asked for; None to start a deployment."""
    asked = [name for name in _CHANGES if getattr(options, name)]
    values = {name: getattr(options, name) for name in options.model_fields_set}
    given = {name for name, value in values.items() if value not in (None, ()) and value is not False}
    if not asked:
        if options.canary is not None:
            raise JobError("canary", "is the share of an --update", "swift-dist deploy --update NEW --canary 0.1")
        if options.surge is not None and not options.follow:
            raise JobError("surge", "is of an --update, or of --follow", "swift-dist deploy --update NEW --surge 1")
        if options.wait_timeout is not None:
            raise JobError("wait_timeout", "is of a change of a running deployment", "leave it out")
        return None
    if len(asked) > 1:
        raise JobError(asked[1], f"is another change than {asked[0]}", "ask for one after the other")
    extra = sorted(given - _CHANGES[asked[0]] - {asked[0]})
    if extra:
        raise JobError(extra[0], f"has no meaning with --{asked[0]}: the deployment runs already", _NOT)
    if options.launcher != "local":
        raise JobError("launcher", "a change goes where the deployment was sent", "leave it out, or --launcher local")
    if options.surge is not None and options.canary is not None:
        raise JobError("surge", "a canary runs beside all old replicas", "--promote --surge for the rest of them")
    return asked[0]


def render(result: dict[str, Any]) -> str:
    """What a person reads of it."""
    if "plan" in result:
        return result["plan"]
    if "replicas" in result:
        return render_status(result)
    return result.get("message", "")
