"""A whole deployment under load: processes killed, adapters, updates, rollbacks. The engine is one that starts at once.

What an engine itself does is tested elsewhere; here nothing between a client and an engine is replaced.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from deployment import Deployment, wait_until
from load_generator import Load, chat_body
from openai import NotFoundError, OpenAI
from prometheus_client.parser import text_string_to_metric_families
from toy_engine import save_toy_adapter, save_toy_model

TOY = ("--infer_backend", "toy_engine:ENGINE")
pytestmark = pytest.mark.timeout(900)  # three updates of two replicas each took 105 s on two cores with a load of 11


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_toy_model(folder / "one", "one", seconds=0.15)
    save_toy_model(folder / "two", "two", seconds=0.15)
    save_toy_model(folder / "broken", "", fails="the weights are damaged")
    save_toy_model(folder / "other", "other")
    for name in ("poems", "songs"):
        save_toy_adapter(folder / name)
    return folder


@pytest.fixture(scope="module")
def deployment(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("run") / "deployment"
    words = ["--model", str(models / "one"), "--served_model_name", "chat", "--models", f"other={models / 'other'}"]
    with Deployment(folder, *words, *TOY, "--replicas", "2") as running:
        yield running.wait_ready()


@pytest.fixture
def client(deployment: Deployment) -> OpenAI:
    return OpenAI(base_url=f"{deployment.url}/v1", api_key="none", max_retries=0, timeout=120)


def said(client: OpenAI, model: str) -> str:
    answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hello"}])
    return str(answer.choices[0].message.content)


def lost(deployment: Deployment, replica: dict[str, Any]) -> None:
    """Wait until it counts as lost; its successor may be ready by then."""
    wait_until(lambda: replica["id"] not in {r["id"] for r in deployment.replicas()}, 60, "the loss is seen")


def load(deployment: Deployment, model: str = "chat", **more: int) -> Load:
    return Load(deployment.url, [chat_body(model, "hello")], concurrency=12, **more)


def test_two_models_behind_one_address(deployment, client):
    assert said(client, "chat").startswith("one chat ")
    assert said(client, "other").startswith("other other ")
    assert [model.id for model in client.models.list()] == ["chat", "other"]
    with pytest.raises(NotFoundError):
        said(client, "third")
    assert httpx.get(f"{deployment.url}/health", timeout=60).status_code == 200


def test_both_replicas_answer(deployment, client):
    assert len({said(client, "chat") for _ in range(20)}) == 2


def test_a_killed_replica_and_a_killed_engine_lose_no_request(deployment):
    version = deployment.status()["models"][0]["versions"][0]["id"]
    with load(deployment).in_background() as running:
        running.wait_for(20)
        killed = deployment.wait_for(2, version)[0]
        os.kill(killed["pids"][0], signal.SIGKILL)
        lost(deployment, killed)
        of_engine = deployment.wait_for(2, version)[0]
        os.kill(deployment.engine_pids(of_engine)[0], signal.SIGKILL)
        lost(deployment, of_engine)
        deployment.wait_for(2, version)
        running.wait_for(len(running.answers) + 20)
    assert not running.report.failures, running.report.describe()
    assert len(deployment.status()["restart_seconds"][version]) == 2


def test_an_adapter_comes_and_goes_under_load_and_outlives_a_replica(deployment, models, client):
    version = deployment.status()["models"][0]["versions"][0]["id"]
    with load(deployment).in_background() as base:
        done = deployment.change("--load_adapter", f"poems={models / 'poems'}", "--served_model_name", "chat")
        assert done.returncode == 0, done.stderr
        assert said(client, "poems").startswith("one poems")
        with load(deployment, "poems").in_background() as running:
            killed = deployment.wait_for(2, version)[0]
            os.kill(killed["pids"][0], signal.SIGKILL)
            lost(deployment, killed)
            assert [r["adapters"] for r in deployment.wait_for(2, version)] == [["poems"], ["poems"]]
            running.wait_for(len(running.answers) + 20)
        assert not running.report.failures, running.report.describe()
        assert "poems" in [model.id for model in client.models.list()]
        assert deployment.change("--unload_adapter", "poems").returncode == 0
        with pytest.raises(NotFoundError):
            said(client, "poems")
    assert not base.report.failures, base.report.describe()
    assert [r["adapters"] for r in deployment.replicas(version)] == [[], []]


def test_an_adapter_that_one_replica_refuses_is_on_none(deployment, models):
    version = deployment.status()["models"][0]["versions"][0]["id"]
    replicas = deployment.wait_for(2, version)
    (models / "songs" / "refuse").write_text(str(replicas[1]["port"]))
    done = deployment.change("--load_adapter", f"songs={models / 'songs'}", "--served_model_name", "chat")
    assert done.returncode == 1
    assert "rank too large" in done.stderr
    for replica in replicas:
        listed = httpx.get(f"http://127.0.0.1:{replica['port']}/v1/models", timeout=60).json()["data"]
        assert [m["id"] for m in listed] == ["chat"]


@pytest.mark.parametrize(
    ("name", "path", "status"),
    [
        ("../poems", "poems", 400),
        ("chat", "poems", 409),
        ("poems", "../../../../etc", 400),
        ("poems", "/etc", 400),  # the owner may name any folder, but this holds no adapter
        ("poems", "nothing", 400),
    ],
)
def test_adapters_that_are_not_allowed(deployment, models, name, path, status):
    body = {"lora_name": name, "lora_path": str(models / path), "model": "chat"}
    control = deployment.folder.read()["control"]
    headers = {"Authorization": f"Bearer {deployment.folder.token()}"}
    answer = httpx.post(f"{control}/v1/load_lora_adapter", json=body, headers=headers, timeout=60)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])


def test_changes_need_the_token(deployment):
    control = deployment.folder.read()["control"]
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert httpx.get(f"{control}/control/status", headers=headers, timeout=60).status_code == 401
        assert httpx.post(f"{control}/control/stop", headers=headers, timeout=60).status_code == 401
    assert deployment.folder.token_path.stat().st_mode & 0o777 == 0o600
    assert httpx.get(f"{deployment.url}/control/status", timeout=60).status_code == 404, "not through the front"


def test_update_canary_promotion_and_rollback_fail_no_request(deployment, models, client):
    with load(deployment).in_background() as running:
        done = deployment.change("--update", str(models / "two"), "--canary", "0.5", "--served_model_name", "chat")
        assert done.returncode == 0, done.stderr
        running.wait_for(len(running.answers) + 50)
        both = {answer.split()[0] for answer in (said(client, "chat") for _ in range(30))}
        assert both == {"one", "two"}
        assert deployment.change("--promote", "--served_model_name", "chat").returncode == 0
        assert {said(client, "chat").split()[0] for _ in range(10)} == {"two"}
        done = deployment.change("--rollback", "--served_model_name", "chat")
        assert done.returncode == 0, done.stderr
        assert {said(client, "chat").split()[0] for _ in range(10)} == {"one"}
        old = deployment.status()["models"][0]["previous"]
        wait_until(lambda: not [r for r in deployment.status()["replicas"] if r["version"] == old], 90, "old ones end")
    assert not running.report.failures, running.report.describe()


def test_one_after_the_other_where_there_is_no_room_for_twice_as_many(deployment, models, client):
    """`--surge 0`: never more than two replicas, and no request fails."""
    wanted: set[int] = set()
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.3):
            versions = deployment.status()["models"][0]["versions"]
            running = [v for v in versions if v["role"] in ("live", "candidate")]
            wanted.add(sum(v["num_replicas"] if v["now"] is None else v["now"] for v in running))

    looking = threading.Thread(target=look)
    with load(deployment).in_background() as running:
        looking.start()
        try:
            change = ["--surge", "0", "--served_model_name", "chat"]
            updated = deployment.change("--update", str(models / "two"), *change)
            back = deployment.change("--rollback", *change)
        finally:
            done.set()
            looking.join()
        assert updated.returncode == 0, updated.stderr
        assert "1 of 2 replicas answer, 100% of the requests" in updated.stderr
        assert back.returncode == 0, back.stderr
        running.wait_for(len(running.answers) + 20)
    assert not running.report.failures, running.report.describe()
    assert len(running.report.count("x-swift-version")) > 1
    assert wanted == {2}
    assert {said(client, "chat").split()[0] for _ in range(10)} == {"one"}
    live = next(v["id"] for v in deployment.status()["models"][0]["versions"] if v["role"] == "live")
    deployment.wait_for(2, live)


def test_who_waits_for_an_update_may_leave_and_the_update_goes_on(deployment, models, client):
    save_toy_model(models / "slow", "slow", start_seconds=12)
    words = ["--update", str(models / "slow"), "--served_model_name", "chat"]
    left = deployment.change(*words, "--wait_timeout", "1")
    assert left.returncode == 1
    assert "goes on being deployed: it was not done within 1 s" in left.stderr and "--status" in left.stderr
    version = next(v["id"] for v in deployment.status()["models"][0]["versions"] if v["role"] == "candidate")
    assert f"{version}: 0 of 2 replicas answer" in left.stderr
    wait_until(lambda: said(client, "chat").startswith("slow"), 120, "the update goes on")
    command = [sys.executable, "-m", "swift_dist.cli", "deploy", "--rollback", "--served_model_name", "chat"]
    command += ["--output", str(deployment.folder.path)]
    waiting = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert waiting.stderr
    line = next(line for line in waiting.stderr if "replicas answer" in line)
    waiting.send_signal(signal.SIGINT)
    rest = waiting.stderr.read()
    assert waiting.wait(60) == 130, line + rest
    assert "goes on being deployed: only this command has ended" in rest
    wait_until(lambda: said(client, "chat").startswith("one"), 120, "the rollback goes on")


def test_a_new_version_that_does_not_start_leaves_the_old_one(deployment, models, client):
    with load(deployment).in_background() as running:
        done = deployment.change("--update", str(models / "broken"), "--served_model_name", "chat")
        assert done.returncode == 1
        assert "the weights are damaged" in done.stderr
    assert not running.report.failures, running.report.describe()
    assert said(client, "chat").startswith("one")


def test_a_killed_controller_goes_on_where_it_was(deployment, client):
    before = deployment.status()
    with load(deployment).in_background() as running:
        os.kill(deployment.pids_of(b"ray::Controller")[0], signal.SIGKILL)
        wait_until(
            lambda: "the controller was restarted" in deployment.stderr and client.models.list(), 120, "it is back"
        )
        running.wait_for(len(running.answers) + 100)
    assert not running.report.failures, running.report.describe()
    ids = {replica["id"] for replica in before["replicas"]}
    wait_until(lambda: {replica["id"] for replica in deployment.replicas()} == ids, 60, "the same replicas answer")


def test_metrics(deployment, client):
    said(client, "chat")
    control = deployment.folder.read()["control"]
    text = httpx.get(f"{control}/metrics", timeout=60).text
    version = deployment.status()["models"][0]["versions"][0]["id"]
    assert f'swift_dist:replicas{{model="chat",state="ready",version="{version}"}} 2.0' in text
    samples = [line for line in text.splitlines() if line.startswith("swift_dist:num_requests_running{")]
    assert len(samples) == 4 and all("replica=" in line for line in samples)
    through_front = httpx.get(f"{deployment.url}/metrics", timeout=60).text
    for own in ("haproxy_frontend_http_requests_total", 'swift_dist:front_server_info{server="r'):
        assert own in text and own in through_front
    families = list(text_string_to_metric_families(through_front))
    assert len({family.name for family in families}) == len(families), "no family stands twice"


def test_status_reads_well(deployment):
    done = deployment.change("--status")
    assert done.returncode == 0
    assert "2 of 2 replicas ready" in done.stdout and "chat-v1  live" in done.stdout


def test_it_ends_in_order_under_load(deployment):
    """The last test: running requests are answered, then nothing is left (the fixture looks for processes)."""
    with load(deployment, requests=16).in_background() as running:
        wait_until(lambda: sum(r["running"] for r in deployment.replicas()) or running.answers, 60, "requests run")
        deployment.stop()
    assert not running.report.failures, running.report.describe()
    assert deployment.process.returncode == 0, deployment.stderr
    assert deployment.folder.read()["state"] == "stopped"
