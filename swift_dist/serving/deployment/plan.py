"""From the keys of `swift-dist deploy` to everything that is to be started. Whatever can be wrong is found here."""

from __future__ import annotations

import os
import secrets
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_dist.config.section import part_of, updated
from swift_dist.errors import JobError
from swift_dist.serving.deployment.desired import version_stem
from swift_dist.serving.deployment.folder import DeploymentFolder, default_folder
from swift_dist.serving.deployment.own_options import OF_ALL, OwnOptions, own_options, with_paths
from swift_dist.serving.deployment.scaling import Bounds, ScaleOptions, parse_bounds
from swift_dist.serving.deployment.spec import DeploymentSpec
from swift_dist.serving.engines.base import Engine
from swift_dist.serving.front.options import FrontOptions, url_of
from swift_dist.serving.options import EngineOptions, ServedModel
from swift_dist.serving.sources.source import ADAPTER_NAME, Source, name_of, resolve_model, resolve_options

if TYPE_CHECKING:
    from swift_dist.serving.deploy import DeployOptions

SURGE = 2  # an update runs two versions of a model at once


@dataclass(frozen=True)
class Planned:
    """A model as it will be served: what the user named, and the folder and adapters that it became.

    Attributes:
        options: its engine's keys. own: which of them `--model_options` named.
    """

    name: str
    source: str
    path: str
    options: EngineOptions
    own: frozenset[str] = frozenset()
    adapters: dict[str, str] = field(default_factory=dict)
    description: str = ""


@dataclass(frozen=True)
class Plan:
    """A deployment that may start.

    Attributes:
        options: as given. engine: that runs it. models: in the order given.
        folder: of the deployment. bounds: of autoscaling.
        address: of the Ray cluster, or "local" for one of its own.
        use_gpu: whether replicas get GPUs; num_gpus, num_cpus: of each.
    """

    options: DeployOptions
    engine: Engine
    models: tuple[Planned, ...]
    folder: DeploymentFolder
    bounds: Bounds | None
    address: str
    use_gpu: bool
    num_gpus: int
    num_cpus: float

    @property
    def is_own(self) -> bool:
        return self.address == "local"

    @property
    def most_replicas(self) -> int:
        """Of a model's version."""
        return self.bounds.most if self.bounds else self.options.replicas

    @property
    def first_replicas(self) -> int:
        return self.bounds.least if self.bounds else self.options.replicas

    def engine_options(self, model: Planned) -> EngineOptions:
        """Its keys, without those of all models that its engine reads of others only, as `--seed` beside embeddings."""
        unread = {m.name: self.engine.ignored(self._served(m, m.options)).keys() for m in self.models}
        elsewhere = {k for k in unread[model.name] - model.own if not all(k in keys for keys in unread.values())}
        return updated(model.options, **{key: EngineOptions.model_fields[key].default for key in elsewhere})

    def front_options(self) -> FrontOptions:
        return part_of(self.options, FrontOptions)

    def served(self, model: Planned) -> ServedModel:
        return self._served(model, self.engine_options(model))

    def _served(self, model: Planned, options: EngineOptions) -> ServedModel:
        return ServedModel(model.name, model.path, options, dict(model.adapters), self.use_gpu)

    def spec(self) -> DeploymentSpec:
        """What the controller is told."""
        named = {path for model in self.models for path in model.adapters.values()}
        roots = [*(str(Path(root).absolute()) for root in self.options.adapter_root), *sorted(named)]
        return DeploymentSpec(
            name=f"swift_dist-{secrets.token_hex(4)}",
            folder=str(self.folder.path),
            options={model.name: self.engine_options(model) for model in self.models},
            engine=self.engine.name,
            num_cpus=self.num_cpus,
            num_gpus=self.num_gpus,
            loopback=self.is_own,
            drain_seconds=float(self.options.drain),
            bounds=self.bounds,
            scale=part_of(self.options, ScaleOptions),
            adapter_roots=tuple(roots),
            first={model.name: (model.source, model.path, model.adapters) for model in self.models},
            num_replicas=self.first_replicas,
            shares_cluster=not self.is_own,
            admin_keys=self.options.admin_keys,
        )


def make_plan(options: DeployOptions) -> Plan:
    """Check everything, cheap things first; convert the models where they need it.

    Raises:
        JobError: it cannot run as asked.
        RunError: a conversion failed.
    """
    from swift_dist.cluster.devices import gpus_of_this_machine
    from swift_dist.serving.engines.choose import choose, uses_gpu
    from swift_dist.serving.front.haproxy import Front, require_port

    bounds = bounds_of(options)
    options = with_absolute_files(options)
    address = options.address or os.environ.get("RAY_ADDRESS") or "local"
    require_roots(options)
    folder = DeploymentFolder(options.output or default_folder())
    if folder.runs():
        raise JobError("output", f"a deployment runs in {folder.path}", "--output another folder, or --stop it first")
    require_port(options.host, options.port)
    Front(folder.front, part_of(options, FrontOptions))  # its keys can be read; starts nothing
    gpus = gpus_of_this_machine() if address == "local" else 0
    use_gpu = address == "local" and uses_gpu(options, gpus, "this machine")  # of a cluster: once it is asked
    engine = choose(part_of(options, EngineOptions), use_gpu if address == "local" else None)
    models = _models(options)
    devices = options.tensor_parallel_size * options.pipeline_parallel_size
    num_versions = len(models) * (bounds.most if bounds else options.replicas)
    plan = Plan(
        options=options,
        engine=engine,
        models=models,
        folder=folder,
        bounds=bounds,
        address=address,
        use_gpu=use_gpu,
        num_gpus=devices if use_gpu else 0,
        num_cpus=options.cpus_per_replica or (_share_of_cpus(num_versions) if address == "local" else devices),
    )
    if plan.is_own:
        _require_resources(plan, num_versions, gpus)
        check_models(plan)
    return plan


def check_models(plan: Plan) -> None:
    """Raises JobError where the engine cannot serve a model as asked."""
    for model in plan.models:
        try:
            plan.engine.check(plan.served(model))
        except JobError as error:
            if error.key in model.own:
                name = f"{model.name}.{error.key}"
                remedy = error.remedy.replace(f"--{error.key}", name)
                raise JobError("model_options", f"{name}: {error.message}", remedy) from None
            if len(plan.models) == 1 or error.key not in EngineOptions.model_fields or error.key in OF_ALL:
                raise
            remedy = f"{error.remedy.rstrip('.')}; of this model alone: --model_options {model.name}.{error.key}=..."
            raise JobError(error.key, f"{model.name}: {error.message}", remedy) from None


def bounds_of(options: DeployOptions) -> Bounds | None:
    """Of `--autoscale`. Raises JobError where it, or a key that belongs to it, cannot be meant."""
    if options.autoscale is None:
        for key in ("target_ongoing_requests", "upscale_delay", "downscale_delay"):
            if key in options.model_fields_set:
                raise JobError(key, "has no meaning without autoscaling", "--autoscale 1:3")
        return None
    if "replicas" in options.model_fields_set:
        raise JobError("replicas", "is set by load with --autoscale", "leave out one of the two")
    target = options.target_ongoing_requests
    if target >= options.max_concurrent:  # what waits at the front is no load of a replica
        raise JobError(
            "target_ongoing_requests",
            f"{target:g}: with --max_concurrent {options.max_concurrent} no replica has more, so none is added",
            "a smaller one, or a larger --max_concurrent",
        )
    try:
        return parse_bounds(options.autoscale)
    except ValueError as error:
        raise JobError("autoscale", str(error), "--autoscale 1:3") from None


def with_absolute_files(options: DeployOptions) -> DeployOptions:
    """Ray's workers, and later commands, have other working directories."""
    given = {key: getattr(options, key) for key in ("admin_keys", "chat_template") if getattr(options, key)}
    changes: dict[str, Any] = {key: str(Path(path).absolute()) for key, path in given.items()}
    changes["model_options"] = with_paths(options.model_options, lambda path: str(Path(path).absolute()))
    return options.model_copy(update=changes)


def require_roots(options: DeployOptions) -> None:
    """Raises JobError where `--adapter_root` names no folder."""
    for root in options.adapter_root:
        if not Path(root).is_dir():
            raise JobError("adapter_root", f"there is no folder {root}", "name one that exists")


def _models(options: DeployOptions) -> tuple[Planned, ...]:
    """What --model, --follow and --models name."""
    from swift_dist.serving.deployment.follow import first_model, require_run

    planned, own = [], own_options(options)
    first = own.of(options.served_model_name or name_of(options.model or options.follow or ""))
    if options.follow:
        require_run(options)
    if options.model or not (options.models or options.follow):
        source = resolve_options(options, trust_remote_code=first.trust_remote_code, task=first.task)
        planned.append(_planned(options.model or "", source, options.served_model_name, own))
    elif options.follow:
        if options.adapters:
            raise JobError("adapters", "belong to one model, and --follow replaces it", "leave them out")
        checkpoint, source = first_model(options, first)
        planned.append(_planned(checkpoint, source, options.served_model_name, own))
    elif options.adapters or options.served_model_name or options.merge_lora:
        key = "adapters" if options.adapters else "served_model_name" if options.served_model_name else "merge_lora"
        raise JobError(key, "belongs to --model", "--model PATH for that one, --models name=PATH for others")
    for word in options.models:
        name, equals, path = word.partition("=")
        if not equals:
            raise JobError("models", f"{word!r} has no name", "--models name=MODEL")
        cache = Path(options.cache) if options.cache else None
        keys = own.of(name)
        source = resolve_model(path, cache=cache, trust_remote_code=keys.trust_remote_code, task=keys.task)
        planned.append(_planned(path, source, name, own))
    own.check_names(model.name for model in planned)
    names = [n for model in planned for n in (model.name, *model.adapters)]
    for name in names:
        if names.count(name) > 1:
            raise JobError("models", f"two are called {name}", "--served_model_name NAME, --models name=MODEL")
    stems = [version_stem(model.name) for model in planned]
    for stem in stems:
        if stems.count(stem) > 1:
            raise JobError("models", f"two have names that files cannot tell apart: {stem}", "call one otherwise")
    return tuple(planned)


def _planned(named: str, source: Source, name: str | None, own: OwnOptions) -> Planned:
    """A source, called `name`: the model, or the adapter where that is what the user named."""
    model_name, adapters = source.base_name, dict(source.adapters)
    if name is not None and source.name in adapters:
        adapters[name] = adapters.pop(source.name)
    elif name is not None:
        model_name = name
    if not model_name or len(model_name) > 200 or any(ord(c) < 32 for c in model_name):
        raise JobError("served_model_name", f"{model_name!r} is no name of a model", "up to 200 printable characters")
    wrong = next((n for n in adapters if not ADAPTER_NAME.fullmatch(n)), None)
    if wrong is not None:
        raise JobError("served_model_name", f"{wrong!r} is no name of an adapter", "letters, digits and . _ : @ + -")
    keys = own.of(model_name)
    keys = updated(keys, task=source.task if keys.task == "auto" else keys.task)
    of_it = frozenset(own.own.get(model_name, ()))
    return Planned(model_name, named, source.path, keys, of_it, adapters, source.description)


def _share_of_cpus(num_replicas: int) -> float:
    cores = len(os.sched_getaffinity(0))
    return float(max(1, cores // num_replicas))


def _require_resources(plan: Plan, num_replicas: int, gpus: int) -> None:
    """Replicas that this machine has no room for are refused, not waited for."""
    if plan.use_gpu:
        needed = num_replicas * plan.num_gpus
        if needed > gpus:
            raise JobError(
                "autoscale" if plan.bounds else "replicas",
                f"{num_replicas} replicas of {plan.num_gpus} GPUs need {needed}; this machine has {gpus}",
                "fewer replicas, or --address of a larger Ray cluster",
            )
        return
    needed_bytes = sum(plan.most_replicas * _bytes(model, plan) for model in plan.models)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed_bytes > memory:
        raise JobError(
            "autoscale" if plan.bounds else "replicas",
            f"the weights and caches of {num_replicas} replicas need {needed_bytes / 2**30:.1f} GiB; this machine has "
            f"{memory / 2**30:.1f} GiB",
            "fewer replicas, a smaller --cpu_cache_gib, or --address of a larger Ray cluster",
        )


def _bytes(model: Planned, plan: Plan) -> float:
    weights = sum(file.stat().st_size for file in Path(model.path).glob("*.safetensors"))
    return weights + plan.engine.cache_gib(plan.engine_options(model)) * 2**30


def _haproxy_cfg(plan: Plan) -> str:
    """The front's configuration as it will be; ports of replicas and of the control API are chosen at the start."""
    from swift_dist.serving.front import config, haproxy
    from swift_dist.serving.front.state import FrontState, Route, Version
    from swift_dist.serving.front.tables import Names, tables

    routes = [
        Route((m.name, *m.adapters), (Version(f"v{n}", ()),), m.options.task == "embed")
        for n, m in enumerate(plan.models)
    ]
    state = FrontState(tuple(routes), ("127.0.0.1", 0))
    slots = haproxy._SLOTS
    return config.render(plan.front_options(), state.control, tables(state, Names(slots)), slots, str(haproxy._LUA))


def describe(plan: Plan) -> dict[str, Any]:
    """What would be started."""
    devices = f"{plan.num_gpus} GPUs" if plan.use_gpu else f"{plan.num_cpus:g} CPUs"
    replicas = f"{plan.bounds.least} to {plan.bounds.most} (by load)" if plan.bounds else str(plan.options.replicas)
    commands = {m.name: shlex.join(plan.engine.command(plan.served(m), "127.0.0.1", 0)) for m in plan.models}
    lines = [
        f"folder: {plan.folder.path}",
        f"address: {url_of(plan.options)}/v1",
        f"Ray cluster: {'one of its own on this machine' if plan.is_own else plan.address}",
        f"engine: {plan.engine.name}, {replicas} replicas of each model, {devices} each",
    ]
    for model in plan.models:
        purpose = "  (embeddings)" if model.options.task == "embed" else ""
        lines += [f"{model.name}: {model.description or model.source}{purpose}"]
        lines += [f"  adapter {name}: {path}" for name, path in model.adapters.items()]
        lines += [f"  {commands[model.name]}"]
    haproxy = _haproxy_cfg(plan)
    lines += ["haproxy.cfg:", *("  " + line for line in haproxy.splitlines())]
    return {
        "plan": "\n".join(lines),
        "folder": str(plan.folder.path),
        "engine": plan.engine.name,
        "replicas": {"least": plan.first_replicas, "most": plan.most_replicas},
        "models": {
            m.name: {"task": m.options.task, "path": m.path, "adapters": m.adapters, "command": commands[m.name]}
            for m in plan.models
        },
        "haproxy_cfg": haproxy,
    }
