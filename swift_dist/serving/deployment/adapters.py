"""Adapters on every replica of a model: loaded and unloaded while it answers, and again on replicas that start later.

The engines' own endpoints do it, so adapters are ordinary local folders. What an engine really has is asked of it once
(``/v1/models``) and remembered, so a controller that was restarted knows it, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_dist.config.section import updated
from swift_dist.errors import JobError
from swift_dist.serving.deployment.desired import ModelState, Refused
from swift_dist.serving.engines.process import message_of
from swift_dist.serving.sources.source import ADAPTER_NAME

if TYPE_CHECKING:
    from swift_dist.serving.deployment.controller import Controller
    from swift_dist.serving.deployment.registry import Seen

_LOAD_SECONDS = 120.0
_AGAIN_SECONDS = 5.0  # after an engine refused


class AdapterRefused(Refused):
    """An adapter cannot be loaded or unloaded; `status` is HTTP's."""

    def __init__(self, message: str, status: int = 400) -> None:
        self.status = status
        super().__init__(message)


def require_name(name: str, taken: Iterable[str]) -> None:
    """Raises AdapterRefused where an adapter cannot be called that."""
    if not ADAPTER_NAME.fullmatch(name):
        raise AdapterRefused(f"{name!r} is no name of an adapter: letters, digits and . _ : @ + - (128 at most)")
    if name in taken:
        raise AdapterRefused(f"{name!r} is loaded already, or a model's name: unload it first", 409)


def require_folder(path: str, roots: Iterable[str]) -> str:
    """The real path of an adapter's folder.

    Args:
        roots: folders below which adapters may lie; links are followed before the comparison.

    Raises:
        AdapterRefused: it is no absolute path, lies elsewhere (403), or holds no adapter.
    """
    if not Path(path).is_absolute():
        raise AdapterRefused(f"{path!r} is no absolute path")
    try:
        real = Path(path).resolve()
        is_below = any(real == (root := Path(r).resolve()) or root in real.parents for r in roots)
        is_adapter = is_below and (real / "adapter_config.json").is_file()
    except (OSError, ValueError):  # such as a name that no file can have
        raise AdapterRefused(f"{path[:200]!r} cannot be looked at, so it is no adapter") from None
    if not is_below:
        raise AdapterRefused("the folder is not below one that the deployment was started with: --adapter_root", 403)
    if not is_adapter:
        raise AdapterRefused(f"{path} holds no adapter_config.json, so it is no adapter")
    return str(real)


class Adapters:
    """The part of the controller that brings adapters to replicas."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._changing = asyncio.Lock()
        self._syncing: dict[str, asyncio.Task[None]] = {}
        self._refusals: dict[str, str] = {}

    async def load(self, name: str, path: str, model_name: str | None, roots: Iterable[str]) -> None:
        """On every replica of a model, or on none.

        Args:
            name: requests' name for it.
            path: its folder.
            model_name: of its model; None where there is one only.
            roots: folders below which it must lie.

        Raises:
            AdapterRefused: the name or folder is not allowed, or an engine refuses.
        """
        async with self._changing:
            controller = self._controller
            model = _checked(controller.model, model_name)
            if model.task == "embed":
                raise AdapterRefused(f"{model.name} is served for embeddings, which are the model's own")
            require_name(name, [n for m in controller.models.values() for n in (m.name, *m.adapters)])
            folder = await asyncio.to_thread(require_folder, path, roots)
            replicas = [seen for seen in self._replicas(model) if seen.adapters is not None]
            if not replicas:
                raise AdapterRefused(f"{model.name} has no replica that is ready", 503)
            if any(name in (seen.adapters or ()) for seen in replicas):
                raise AdapterRefused(f"{name!r} is still being unloaded: answers that run use it; try again", 409)
            results = await asyncio.gather(*(self._bring(s, name, folder) for s in replicas), return_exceptions=True)
            refused = next((r for r in results if isinstance(r, BaseException)), None)
            if refused is not None:
                loaded = [s for s in replicas if s.adapters and name in s.adapters]
                await asyncio.gather(*(self._bring(s, name, None) for s in loaded), return_exceptions=True)
                raise _as_refusal(refused)
            now = controller.models[model.name]  # which a turn of the loop may have changed
            await controller.change(updated(now, adapters={**now.adapters, name: folder}))
            await controller.publish()
            controller.tell(f"adapter {name} is loaded on {len(replicas)} replicas of {model.name}")

    async def unload(self, name: str) -> None:
        """From every replica: requests get 404 from when this returns.

        Raises:
            AdapterRefused: there is no such adapter (404).
        """
        async with self._changing:
            controller = self._controller
            model = next((m for m in controller.models.values() if name in m.adapters), None)
            if model is None:
                raise AdapterRefused(f"no adapter is called {name!r}", 404)
            await controller.change(updated(model, adapters={n: p for n, p in model.adapters.items() if n != name}))
            await controller.publish()
        # An engine may wait for answers that use it: other adapters come and go meanwhile.
        await asyncio.gather(*(self._bring(s, name, None) for s in self._replicas(model)), return_exceptions=True)
        controller.tell(f"adapter {name} is unloaded")

    def refusal(self, version: str) -> str | None:
        """Why a version's engine does not take an adapter of its model."""
        return self._refusals.get(version)

    def forget_refusal(self, version: str) -> None:
        """The version is started again."""
        self._refusals.pop(version, None)

    def reconcile(self) -> None:
        """Begin to bring each replica what it lacks; it is ready when it has everything."""
        for model in self._controller.models.values():
            for seen in self._replicas(model):
                has = seen.adapters
                seen.is_ready = has is not None and model.adapters.items() <= has.items()
                task = self._syncing.get(seen.report.id)
                if has != model.adapters and (task is None or task.done()):
                    self._syncing[seen.report.id] = asyncio.create_task(self._sync(seen, model.name))
        for gone in set(self._syncing) - set(self._controller.registry.seen):
            self._syncing.pop(gone).cancel()

    def _replicas(self, model: ModelState) -> list[Seen]:
        versions = {version.id for version in model.versions}
        return [
            s for s in self._controller.registry.seen.values() if s.report.version in versions and not s.is_draining
        ]

    async def _sync(self, seen: Seen, model_name: str) -> None:
        try:
            if seen.adapters is None:
                seen.adapters = await self._ask(seen)
            async with self._changing:  # what a change that is under way loads or unloads is its own
                wanted = dict(self._controller.models[model_name].adapters)
            for name in {**seen.adapters, **wanted}:
                await self._bring(seen, name, wanted.get(name))
            self._refusals.pop(seen.report.version, None)
            self._controller.wake()
        except Exception as error:
            message = str(_as_refusal(error))
            self._refusals[seen.report.version] = message
            self._controller.tell(f"{seen.report.version}: a replica does not get its adapters: {message}")
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _bring(self, seen: Seen, name: str, path: str | None) -> None:
        """Have a replica's engine serve adapter `name` from `path`, or not at all (None)."""
        async with seen.locks[name]:
            has = seen.adapters.get(name) if seen.adapters is not None else path
            if has == path:
                return
            try:
                if has is not None:
                    await self._post(seen, name, None)
                if path is not None:
                    await self._post(seen, name, path)
            except Exception:
                seen.adapters = await self._ask_again(seen)  # a part may have been done, or be done later
                raise
            if seen.adapters is not None:
                seen.adapters = {n: p for n, p in {**seen.adapters, name: path}.items() if p is not None}

    async def _post(self, seen: Seen, name: str, path: str | None) -> None:
        import httpx

        where, body = self._controller.engine.adapter_request(name, path)
        async with httpx.AsyncClient(timeout=_LOAD_SECONDS, trust_env=False) as client:
            answer = await client.post(seen.url + where, json=body)
        is_gone = path is None and answer.status_code == 404  # an earlier try went on after we had left
        if answer.status_code != 200 and not is_gone:
            raise AdapterRefused(said(answer), answer.status_code if 400 <= answer.status_code < 500 else 502)

    async def _ask(self, seen: Seen) -> dict[str, str]:
        """The adapters that an engine has. One that does not say from which folder has them from its start."""
        import httpx

        async with httpx.AsyncClient(timeout=10.0, trust_env=False) as client:
            answer = await client.get(seen.url + "/v1/models")
        _, *cards = answer.json()["data"]  # the model itself is the first
        roots = {card["id"]: str(card.get("root") or "") for card in cards}
        return {n: root if Path(root).is_absolute() else seen.report.adapters.get(n, "") for n, root in roots.items()}

    async def _ask_again(self, seen: Seen) -> dict[str, str] | None:
        try:
            return await self._ask(seen)
        except Exception:  # it is asked before anything else is brought to it
            return None


def said(answer: Any) -> str:
    """The message of an engine's error."""
    return message_of(answer.text)


def _checked(find: Any, name: str | None) -> ModelState:
    try:
        return find(name)
    except Refused as refused:
        raise AdapterRefused(str(refused), 404 if name else 400) from None


def _as_refusal(error: BaseException) -> AdapterRefused:
    if isinstance(error, AdapterRefused):
        return error
    if isinstance(error, JobError):
        return AdapterRefused(error.message)
    return AdapterRefused(f"an engine did not answer: {type(error).__name__}: {error}", 502)
