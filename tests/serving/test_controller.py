"""Parts of the controller that need no cluster: which replicas count, room, adapters, changes, numbers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from http.client import IncompleteRead
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from toy_engine import ENGINE, save_toy_adapter, save_toy_model

from swift_dist.errors import RunError
from swift_dist.serving.deployment import desired, registry
from swift_dist.serving.deployment.adapters import AdapterRefused, require_folder, require_name
from swift_dist.serving.deployment.changes import Control
from swift_dist.serving.deployment.control import control_app
from swift_dist.serving.deployment.controller import Controller
from swift_dist.serving.deployment.desired import ModelState
from swift_dist.serving.deployment.folder import DeploymentFolder
from swift_dist.serving.deployment.metrics import deployment_metrics, relabelled
from swift_dist.serving.deployment.registry import Registry
from swift_dist.serving.deployment.replica import Report, drained
from swift_dist.serving.deployment.resources import fitting
from swift_dist.serving.deployment.scaling import ScaleOptions
from swift_dist.serving.deployment.spec import DeploymentSpec
from swift_dist.serving.engines.base import Load
from swift_dist.serving.engines.process import EngineProcess
from swift_dist.serving.options import EngineOptions, ServedModel


def report(name: str, version: str = "chat-v1", running: int = 0, waiting: int = 0) -> Report:
    return Report(name, version, "127.0.0.1", 9000, "node", (1, 2), Load(running, waiting), 1.0, 0.0)


@pytest.fixture
def replicas() -> Registry:
    return Registry(lambda: None, lambda: None)


def test_only_replicas_that_are_ready_and_stay_get_requests(replicas):
    for name in "abc":
        replicas.report(report(name, running=2, waiting=1))
    replicas.seen["a"].is_ready = replicas.seen["b"].is_ready = True
    replicas.seen["b"].is_draining = True
    assert [r.id for r in replicas.ready()["chat-v1"]] == ["a"]
    assert replicas.load("chat-v1") == 6, "what drains is no reason for more replicas"
    replicas.seen["a"].at -= 60
    assert replicas.ready() == {}, "it has not said anything for a minute"
    replicas.report(report("a"))
    assert [r.id for r in replicas.ready()["chat-v1"]] == ["a"]


def test_a_loss_is_made_good_by_the_next_replica_of_that_version(replicas):
    replicas.report(report("a"))
    replicas.lose("a", "its engine ended (137)")
    replicas.lose("a", "said twice")
    replicas.report(report("other", version="chat-v2"))
    assert len(replicas.losses["chat-v1"].open) == 1
    replicas.report(report("b"))
    assert (replicas.losses["chat-v1"].open, len(replicas.losses["chat-v1"].seconds)) == ([], 1)
    said = [event.text for event in replicas.events]
    assert said[0] == "chat-v1: a replica was lost: its engine ended (137)"
    assert "a replica answers again" in said[1]
    assert [e.number for e in replicas.events] == sorted({e.number for e in replicas.events})


def test_a_replica_that_was_told_to_stop_is_no_loss(replicas):
    replicas.report(report("a"))
    replicas.seen["a"].is_draining = True
    replicas.lose("a", "its process ended")
    assert replicas.events == []


@pytest.mark.parametrize(("lives", "left"), [(True, ["a", "b"]), (False, ["b"])])
def test_a_silent_replica_is_lost_where_its_process_has_ended(replicas, monkeypatch, lives, left):
    monkeypatch.setattr(registry, "actor_lives", lambda name: lives)
    replicas.report(report("a"))
    replicas.report(report("b"))
    replicas.seen["a"].at -= 5
    asyncio.run(replicas.look_for_lost())
    assert sorted(replicas.seen) == left


@pytest.mark.parametrize(
    ("nodes", "num_cpus", "num_gpus", "replicas"),
    [
        ([{"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 1}], 1, 2, 2),  # two GPUs of different nodes are no pair
        ([{"CPU": 3.0}, {"CPU": 1.5}], 1.5, 0, 3),
        ([{"CPU": 1, "GPU": 8}], 1, 1, 1),
        ([{}], 1, 0, 0),
    ],
)
def test_a_replica_lies_on_one_node(nodes, num_cpus, num_gpus, replicas):
    assert fitting(nodes, num_cpus, num_gpus) == replicas


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".a", "a b", "a\n", "a" * 129, "ä"])
def test_names_that_no_adapter_may_have(name):
    with pytest.raises(AdapterRefused, match="no name of an adapter"):
        require_name(name, [])


def test_a_name_is_given_once():
    require_name("poems", ["chat"])
    with pytest.raises(AdapterRefused) as refused:
        require_name("chat", ["chat"])
    assert refused.value.status == 409


def test_adapters_lie_below_a_root_also_through_links(tmp_path):
    inside, outside = save_toy_adapter(tmp_path / "root" / "a"), save_toy_adapter(tmp_path / "outside")
    roots = [str(tmp_path / "root")]
    assert require_folder(str(inside), roots) == str(inside)
    (tmp_path / "root" / "link").symlink_to(outside)
    for path in (outside, tmp_path / "root" / "link", tmp_path / "root" / ".." / "outside", tmp_path / "root-2"):
        with pytest.raises(AdapterRefused) as refused:
            require_folder(str(path), roots)
        assert refused.value.status == 403, path
    for path in ("a", "root/a"):
        with pytest.raises(AdapterRefused, match="no absolute path"):
            require_folder(path, roots)
    assert require_folder(str(outside), [*roots, str(outside)]) == str(outside), "a root may be the adapter itself"


@pytest.mark.parametrize("path", ["/a\0b", "/\ud800", "/" + "a" * 5000])
def test_a_path_that_no_folder_can_have_is_no_adapter(path):
    with pytest.raises(AdapterRefused) as refused:
        require_folder(path, ["/"])
    assert refused.value.status == 400
    str(refused.value).encode()


def controller(folder: Path) -> Controller:
    """One whose model ``chat`` has a live version, without a cluster or front."""
    spec = DeploymentSpec(
        name="test",
        folder=str(folder / "deployment"),
        options={"chat": EngineOptions()},
        engine=ENGINE.name,
        num_cpus=1,
        num_gpus=0,
        loopback=True,
        drain_seconds=1.0,
        bounds=None,
        scale=ScaleOptions(),
        adapter_roots=(str(folder),),
        first={},
        num_replicas=1,
        shares_cluster=False,
    )
    DeploymentFolder(spec.folder).claim()
    made = Controller(spec)
    model = desired.propose(ModelState(name="chat"), "model", str(folder / "model"), 1)
    made.models["chat"] = desired.settle(model, {"chat-v1": 1})
    made.publish = _nothing  # type: ignore[method-assign]
    return made


async def _nothing() -> None:
    pass


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[EngineProcess]:
    """An engine that was started with adapter ``a`` from folder ``A``."""
    model = save_toy_model(tmp_path / "model", "hello")
    for name in ("A", "B"):
        save_toy_adapter(tmp_path / name)
    served = ServedModel("chat", str(model), EngineOptions(), {"a": str(tmp_path / "A")})
    with EngineProcess(ENGINE, served, "127.0.0.1", log=tmp_path / "log") as process:
        process.start()
        process.wait_ready()
        yield process


def with_replica(folder: Path, toy: EngineProcess, talk: Callable[[Controller], Awaitable[Any]]) -> Any:
    """What `talk` returns of a controller whose one replica is `toy`."""

    async def run() -> Any:
        made = controller(folder)
        made.registry.report(replace(report("r"), port=toy.port, adapters={"a": str(folder / "A")}))
        return await talk(made)

    return asyncio.run(run())


async def settled(made: Controller) -> bool:
    """Whether the replica has what it is to have, after some turns."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        made.adapters.reconcile()
        if made.registry.seen["r"].is_ready and not any(not t.done() for t in made.adapters._syncing.values()):
            return True
        await asyncio.sleep(0.02)
    return False


def folders(toy: EngineProcess) -> dict[str, str]:
    cards = httpx.get(f"http://127.0.0.1:{toy.port}/v1/models", trust_env=False).json()["data"]
    return {card["id"]: Path(card["root"]).name for card in cards[1:]}


def test_an_adapter_that_changed_its_folder_while_a_replica_started_is_taken_from_the_new_one(tmp_path, toy):
    async def talk(made: Controller) -> bool:
        made.models["chat"] = desired.updated(made.models["chat"], adapters={"a": str(tmp_path / "B")})
        return await settled(made)

    assert with_replica(tmp_path, toy, talk)
    assert folders(toy) == {"a": "B"}


def test_what_an_engine_lost_or_kept_behind_our_back_does_not_stay_in_the_way(tmp_path, toy):
    async def talk(made: Controller) -> None:
        made.models["chat"] = desired.updated(made.models["chat"], adapters={"a": str(tmp_path / "A")})
        assert await settled(made)
        toy.unload_adapter("a")  # as an unload that went on after its caller had left
        await made.adapters.unload("a")
        assert made.registry.seen["r"].adapters == {}
        (tmp_path / "B" / "refuse").write_text("")
        toy.load_adapter("b", str(tmp_path / "A"))
        with pytest.raises(AdapterRefused):
            await made.adapters.load("b", str(tmp_path / "B"), None, [str(tmp_path)])
        assert (made.registry.seen["r"].adapters, folders(toy)) == ({}, {}), "asked after the refusal, and taken out"
        (tmp_path / "B" / "refuse").unlink()
        made.registry.seen["r"].adapters = {"b": str(tmp_path / "A")}
        with pytest.raises(AdapterRefused, match="still being unloaded"):
            await made.adapters.load("b", str(tmp_path / "B"), None, [str(tmp_path)])
        assert await settled(made)
        await made.adapters.load("b", str(tmp_path / "B"), None, [str(tmp_path)])

    with_replica(tmp_path, toy, talk)
    assert folders(toy) == {"b": "B"}


def test_an_unload_that_waits_for_an_answer_holds_up_no_other_adapter(tmp_path, toy, monkeypatch):
    async def talk(made: Controller) -> None:
        made.models["chat"] = desired.updated(made.models["chat"], adapters={"a": str(tmp_path / "A")})
        assert await settled(made)
        post, answered = made.adapters._post, asyncio.Event()

        async def slow(seen: Any, name: str, path: str | None) -> None:
            if path is None:
                await answered.wait()
            await post(seen, name, path)

        monkeypatch.setattr(made.adapters, "_post", slow)
        unloading = asyncio.create_task(made.adapters.unload("a"))
        await asyncio.sleep(0)
        await asyncio.wait_for(made.adapters.load("b", str(tmp_path / "B"), None, [str(tmp_path)]), 60.0)
        answered.set()
        await unloading

    with_replica(tmp_path, toy, talk)
    assert folders(toy) == {"b": "B"}


def test_metrics_of_several_engines_are_one_text():
    text = '# HELP x:running Running\n# TYPE x:running gauge\nx:running{{model="m"}} {}\n'
    text += "# TYPE n_total counter\nn_total 4\n"
    families = relabelled([({"replica": "a"}, text.format(1)), ({"replica": "b"}, text.format(2))])
    assert [family.name for family in families] == ["x:running", "n"]
    assert [(s.labels, s.value) for s in families[0].samples] == [
        ({"model": "m", "replica": "a"}, 1.0),
        ({"model": "m", "replica": "b"}, 2.0),
    ]


@pytest.mark.parametrize("error", [FileNotFoundError("no socket"), IncompleteRead(b"half of it")])
def test_a_front_that_ends_takes_only_its_own_numbers_with_it(tmp_path, monkeypatch, error):
    def ended(folder: Path) -> str:
        raise error

    monkeypatch.setattr("swift_dist.serving.front.runtime.metrics", ended)
    text = asyncio.run(deployment_metrics(controller(tmp_path)))
    assert 'swift_dist:replicas{model="chat",state="wanted",version="chat-v1"} 1.0' in text


def test_a_folder_is_one_deployments(tmp_path: Path):
    first, second = DeploymentFolder(tmp_path), DeploymentFolder(tmp_path)
    assert not first.runs()
    first.claim()
    assert second.runs()
    with pytest.raises(ValueError, match="a deployment runs in"):
        second.claim()
    token = first.make_token()
    assert second.token() == token != first.make_token()
    assert first.token_path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("change", ["update", "rollback"])
def test_what_changes_while_room_is_looked_for_stays(tmp_path, monkeypatch, change):
    made = controller(tmp_path)
    if change == "rollback":
        updating = desired.propose(made.models["chat"], "other", "/other", 1)
        made.models["chat"] = desired.settle(updating, {"chat-v2": 1})

    async def meanwhile(*_: object) -> None:
        made.models["chat"] = desired.updated(made.models["chat"], adapters={"a": "/a"})

    monkeypatch.setattr(made, "_require_room", meanwhile)
    doing = made.rollback(None) if change == "rollback" else made.update(None, "new", "/new", 1.0, None)
    model = asyncio.run(doing)
    assert model.candidate and model.adapters == {"a": "/a"}


def test_two_updates_at_once_are_one_and_a_refusal(tmp_path, monkeypatch):
    made = controller(tmp_path)
    monkeypatch.setattr(made, "_require_room", lambda *_: asyncio.sleep(0.01))

    async def both() -> list[Any]:
        updates = [made.update(None, new, f"/{new}", 1.0, None) for new in "ab"]
        return await asyncio.gather(*updates, return_exceptions=True)

    first, second = asyncio.run(both())
    assert isinstance(second, desired.Refused) and [v.source for v in first.versions] == ["model", "a"]


def test_an_application_that_is_wanted_again_is_not_deleted(tmp_path, monkeypatch):
    made, deleted = controller(tmp_path), []
    made.models["chat"] = desired.settle(desired.propose(made.models["chat"], "other", "/other", 1), {"chat-v2": 1})
    made._apps = {"chat-v1": 1, "chat-v2": 1}

    async def rolled_back() -> None:  # while the front takes its new state
        if made.models["chat"].candidate is None:
            await made.rollback(None)

    monkeypatch.setattr(made, "publish", rolled_back)
    monkeypatch.setattr(made.apps, "delete", deleted.append)
    monkeypatch.setattr(made.apps, "failure", lambda version: None)
    asyncio.run(made._reconcile())
    assert deleted == [] and set(made._apps) == {"chat-v1", "chat-v2"}


def test_a_refusal_of_an_earlier_attempt_fails_no_rollback(tmp_path):
    made = controller(tmp_path)
    made.models["chat"] = desired.settle(desired.propose(made.models["chat"], "other", "/other", 1), {"chat-v2": 1})
    made.adapters._refusals["chat-v1"] = "rank too large"
    model = asyncio.run(made.rollback(None))
    assert asyncio.run(made._give_up(model)).candidate is not None


def test_who_may_load_adapters_and_from_where(tmp_path):
    """Keys of the file (comments in it are none): from below --adapter_root. Its owner: from anywhere."""
    (tmp_path / "keys").write_text("# key of ada\nsecret-1\n\n")
    made = controller(tmp_path)
    made.folder.make_token()
    made.spec = replace(made.spec, admin_keys=str(tmp_path / "keys"))

    async def asked(key: str, folder: str = "/a\0b") -> httpx.Response:
        transport = httpx.ASGITransport(control_app(made))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body, headers = {"lora_name": "a", "lora_path": folder}, {"Authorization": f"Bearer {key}"}
            return await client.post("/v1/load_lora_adapter", json=body, headers=headers)

    assert [asyncio.run(asked(key)).status_code for key in ("key", "ada", "#", "wrong")] == [401] * 4
    answer = asyncio.run(asked("secret-1"))
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    elsewhere = save_toy_adapter(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    assert asyncio.run(asked("secret-1", str(elsewhere))).status_code == 403, "not below --adapter_root"
    owner = asyncio.run(asked(made.folder.token(), str(elsewhere)))
    assert (owner.status_code, "no replica" in owner.text) == (503, True), "may name any folder"


def test_an_answer_that_is_no_json_is_said_as_it_is(tmp_path, monkeypatch):
    made = controller(tmp_path)
    made.folder.make_token()
    made.folder.write(control="http://127.0.0.1:1")
    monkeypatch.setattr(httpx, "request", lambda *_, **__: httpx.Response(500, text="Internal Server Error"))
    with pytest.raises(RunError, match="Internal Server Error"):
        Control(made.folder).ask("GET", "/control/status")


@pytest.mark.parametrize(("gauge_seconds", "last_busy"), [(0.0, None), (0.5, 1)])
def test_a_replica_has_drained_once_it_was_idle_for_longer_than_its_gauges_are_old(gauge_seconds, last_busy):
    """Old gauges say idle at the first look, and only then show the answer that runs."""
    looked: list[float] = []

    class Process:
        alive = True
        engine = SimpleNamespace(gauge_seconds=gauge_seconds)

        def load(self) -> Load:
            looked.append(time.monotonic())
            return Load(1 if len(looked) - 1 == last_busy else 0, 0)

    asyncio.run(drained(Process(), time.monotonic() + 60))
    assert len(looked) >= 2 and looked[-1] - looked[last_busy or 0] > gauge_seconds
