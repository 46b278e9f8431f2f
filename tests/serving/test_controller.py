"""Parts of the controller that need no cluster: which replicas count, room, adapters' names and folders, numbers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from toy_engine import save_toy_adapter

from swift_dist.serving import registry
from swift_dist.serving.adapters import AdapterRefused, require_folder, require_name
from swift_dist.serving.engines.base import Load
from swift_dist.serving.folder import DeploymentFolder
from swift_dist.serving.metrics import relabelled
from swift_dist.serving.registry import Registry
from swift_dist.serving.replica import Report
from swift_dist.serving.resources import fitting


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


def test_metrics_of_several_engines_are_one_text():
    text = '# HELP x:running Running\n# TYPE x:running gauge\nx:running{{model="m"}} {}\n'
    text += "# TYPE n_total counter\nn_total 4\n"
    families = relabelled([({"replica": "a"}, text.format(1)), ({"replica": "b"}, text.format(2))])
    assert [family.name for family in families] == ["x:running", "n"]
    assert [(s.labels, s.value) for s in families[0].samples] == [
        ({"model": "m", "replica": "a"}, 1.0),
        ({"model": "m", "replica": "b"}, 2.0),
    ]


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
