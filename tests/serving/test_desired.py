"""What each event makes of a model's versions, and where its requests go then."""

from __future__ import annotations

import pytest

from swift_dist.serving.deployment import desired
from swift_dist.serving.deployment.desired import ModelState, Refused
from swift_dist.serving.front.state import Replica


def live_model(num_replicas: int = 2) -> ModelState:
    model = desired.propose(ModelState(name="chat"), "one", "/one", num_replicas)
    return desired.settle(model, {"chat-v1": num_replicas})


def replicas(version: str, count: int) -> list[Replica]:
    return [Replica(f"{version}-{n}", "127.0.0.1", 9000 + n) for n in range(count)]


def shares(model: ModelState) -> dict[str, float]:
    found = {version.id: version.share for version in desired.route(model, {}).versions}
    if model.live:
        assert {k: v for k, v in found.items() if v} == {
            v.id: model.share_of(v) for v in model.versions if model.share_of(v)
        }, "what the status says"
    return found


def test_the_first_version_answers_as_soon_as_one_replica_is_ready():
    model = desired.propose(ModelState(name="chat", adapters={"poems": "/p"}), "one", "/one", 2)
    assert model.live is None
    route = desired.route(model, {"chat-v1": replicas("chat-v1", 1)})
    assert route.names == ("chat", "poems")
    assert [(v.id, v.share, len(v.replicas)) for v in route.versions] == [("chat-v1", 1.0, 1)]
    assert desired.settle(model, {"chat-v1": 1}) == model
    assert desired.settle(model, {"chat-v1": 2}).live.id == "chat-v1"


def test_an_update_gets_requests_once_all_its_replicas_are_ready():
    model = desired.propose(live_model(), "two", "/two", 2)
    assert shares(model) == {"chat-v1": 1.0}
    assert desired.wanted([model]) == {"chat-v1": 2, "chat-v2": 2}
    assert desired.settle(model, {"chat-v1": 2, "chat-v2": 1}) == model
    model = desired.settle(model, {"chat-v1": 2, "chat-v2": 2})
    assert (model.live.id, model.previous, shares(model)) == ("chat-v2", "chat-v1", {"chat-v2": 1.0})
    assert desired.wanted([model]) == {"chat-v2": 2}


def test_a_canary_gets_its_share_and_is_promoted_with_as_many_replicas_as_the_old_version():
    model = desired.propose(live_model(4), "two", "/two", desired.canary_replicas(4, 0.25), share=0.25)
    model = desired.settle(model, {"chat-v1": 4, "chat-v2": 1})
    assert shares(model) == {"chat-v1": 0.75, "chat-v2": 0.25}
    assert desired.settle(model, {"chat-v1": 4, "chat-v2": 1}) == model
    model = desired.promote(model)
    assert desired.wanted([model]) == {"chat-v1": 4, "chat-v2": 4}
    assert desired.settle(model, {"chat-v2": 3}) == model
    assert shares(desired.settle(model, {"chat-v2": 4})) == {"chat-v2": 1.0}


def test_a_canary_with_its_share_is_no_work_in_progress():
    model = desired.propose(live_model(), "new", "/new", 1, share=0.25)
    assert not desired.is_settled(model)
    model = desired.settle(model, {"chat-v1": 2, "chat-v2": 1})
    assert desired.is_settled(model)
    assert not desired.is_settled(desired.promote(model))


def test_a_canary_is_rolled_back_at_once():
    model = desired.settle(desired.propose(live_model(), "two", "/two", 1, share=0.1), {"chat-v2": 1})
    model = desired.rollback(model)
    assert (model.live.id, shares(model), desired.wanted([model])) == ("chat-v1", {"chat-v1": 1.0}, {"chat-v1": 2})


def test_a_rollback_starts_the_version_before_and_can_be_undone():
    model = desired.settle(desired.propose(live_model(), "two", "/two", 2), {"chat-v2": 2})
    model = desired.rollback(model)
    assert (model.live.id, model.candidate.id, shares(model)) == ("chat-v2", "chat-v1", {"chat-v2": 1.0})
    model = desired.settle(model, {"chat-v1": 2})
    assert (model.live.id, model.previous) == ("chat-v1", "chat-v2")
    assert desired.rollback(model).candidate.id == "chat-v2"


def test_a_version_that_fails_changes_nothing_else():
    before = live_model()
    model = desired.fail(desired.propose(before, "two", "/two", 2), "chat-v2", "no such weights")
    assert (model.live, shares(model)) == (before.live, {"chat-v1": 1.0})
    assert model.version("chat-v2").message == "no such weights"
    assert desired.changes(desired.propose(before, "two", "/two", 2), model) == [
        "chat-v2 failed; chat-v1 goes on: no such weights"
    ]
    assert desired.propose(model, "three", "/three", 2).candidate.id == "chat-v3", "a name is never used again"
    assert desired.fail(model, "chat-v1", "late news") == model, "a live version does not fail: Serve restarts it"


def test_what_is_refused():
    model = live_model()
    with pytest.raises(Refused, match="no version to go back to"):
        desired.rollback(model)
    with pytest.raises(Refused, match="no canary"):
        desired.promote(model)
    model = desired.propose(model, "two", "/two", 2)
    with pytest.raises(Refused, match="chat-v2 is being started: promote it or roll it back first"):
        desired.propose(model, "three", "/three", 2)
    with pytest.raises(Refused, match="no canary"):
        desired.promote(model)


def taken_over(model: ModelState, surge: int, limit: int = 20) -> ModelState:
    """Every step of a take-over, each once all that is wanted is ready; what holds at each of them is asserted."""
    total = model.live.num_replicas
    ready = 0
    for _ in range(limit):
        if model.candidate is None:
            return model
        wanted = desired.wanted([model])
        assert sum(wanted.values()) <= total + surge
        assert model.live.num_wanted + ready >= total - (0 if surge else 1), "that many answer meanwhile"
        assert sum(shares(model).values()) == pytest.approx(1)
        assert not desired.is_settled(model)
        assert desired.settle(model, {**wanted, model.candidate.id: ready}) == model, "it waits for the new replicas"
        ready = model.candidate.num_wanted
        model = desired.settle(model, wanted)
    raise AssertionError("it does not end")


@pytest.mark.parametrize(("total", "surge"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (5, 2), (4, 9), (1, 1)])
def test_with_a_surge_a_version_takes_over_a_few_replicas_at_a_time(total, surge):
    model = taken_over(desired.propose(live_model(total), "two", "/two", total, surge=surge), surge)
    assert (model.live.id, model.previous, shares(model)) == ("chat-v2", "chat-v1", {"chat-v2": 1.0})
    assert desired.wanted([model]) == {"chat-v2": total}
    back = taken_over(desired.rollback(model, surge), surge)
    assert (back.live.id, desired.wanted([back])) == ("chat-v1", {"chat-v1": total})


def test_the_steps_of_a_take_over_and_its_shares():
    model = desired.propose(live_model(3), "two", "/two", 3, surge=0)
    seen = []
    while model.candidate:
        seen.append((desired.wanted([model]), round(model.candidate.share, 2)))
        model = desired.settle(model, desired.wanted([model]))
    assert seen == [
        ({"chat-v1": 2, "chat-v2": 1}, 0.0),
        ({"chat-v1": 1, "chat-v2": 2}, 0.5),
        ({"chat-v2": 3}, 1.0),
    ]
    model = desired.propose(live_model(3), "two", "/two", 3, surge=1)
    assert desired.wanted([model]) == {"chat-v1": 3, "chat-v2": 1}
    model = desired.settle(model, desired.wanted([model]))
    assert (desired.wanted([model]), round(model.candidate.share, 2)) == ({"chat-v1": 2, "chat-v2": 2}, 0.33)


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("surge", [0, 1])
def test_a_take_over_is_rolled_back_from_wherever_it_is(steps, surge):
    model = desired.propose(live_model(3), "two", "/two", 3, surge=surge)
    for _ in range(steps):
        model = desired.settle(model, desired.wanted([model]))
    had = sum(desired.wanted([model]).values())
    model = desired.rollback(model)
    assert sum(desired.wanted([model]).values()) <= had or not steps, "nothing starts before there is room"
    for _ in range(20):
        if not model.candidate:
            break
        assert sum(desired.wanted([model]).values()) <= 3 + surge
        model = desired.settle(model, desired.wanted([model]))
    assert (model.live.id, model.candidate, desired.wanted([model])) == ("chat-v1", None, {"chat-v1": 3})


def test_a_take_over_that_fails_gives_the_old_version_its_replicas_back():
    model = desired.propose(live_model(2), "two", "/two", 2, surge=0)
    assert desired.wanted([model]) == {"chat-v1": 1, "chat-v2": 1}
    model = desired.fail(model, "chat-v2", "no such weights")
    assert (desired.wanted([model]), shares(model)) == ({"chat-v1": 2}, {"chat-v1": 1.0})


@pytest.mark.parametrize(("surge", "old"), [(1, 2), (0, 1)])
def test_a_canary_is_promoted_a_few_replicas_at_a_time(surge, old):
    model = desired.settle(desired.propose(live_model(3), "two", "/two", 1, share=0.25), {"chat-v2": 1})
    model = desired.promote(model, surge)
    assert (desired.wanted([model]), model.candidate.share) == ({"chat-v1": old, "chat-v2": 2}, 1 / (1 + old))
    for _ in range(2):
        model = desired.settle(model, desired.wanted([model]))
    assert (model.live.id, desired.wanted([model])) == ("chat-v2", {"chat-v2": 3})


def test_a_surge_that_does_not_fit_is_refused():
    with pytest.raises(Refused, match="has one replica"):
        desired.propose(live_model(1), "two", "/two", 1, surge=0)
    with pytest.raises(Refused, match="a canary runs beside all old replicas"):
        desired.propose(live_model(2), "two", "/two", 1, share=0.5, surge=1)


def test_old_versions_are_forgotten_but_not_the_one_to_go_back_to():
    model = live_model(1)
    model = desired.settle(desired.propose(model, "two", "/two", 1), {"chat-v2": 1})
    for number in range(3, 30):
        model = desired.fail(desired.propose(model, "bad", "/bad", 1), f"chat-v{number}", "bad")
        model = desired.settle(model, {})
    model = desired.settle(desired.propose(model, "new", "/new", 1), {"chat-v30": 1})
    assert len(model.versions) < 12
    assert model.previous == "chat-v2" and model.version("chat-v2")


@pytest.mark.parametrize(("name", "stem"), [("org/model 7B:x", "org-model-7B-x"), ("模型", "model"), ("a.b", "a.b")])
def test_names_of_versions_are_safe(name, stem):
    model = desired.propose(ModelState(name=name), "s", "/p", 1)
    assert model.candidate.id == f"{stem}-v1"


def test_a_state_survives_its_file(tmp_path):
    from swift_dist.serving.deployment.folder import DeploymentFolder

    folder = DeploymentFolder(tmp_path)
    assert folder.read_state() is None
    model = desired.propose(live_model(), "two", "/two", 2, share=0.1)
    folder.write_state([model])
    assert folder.read_state() == [model]
