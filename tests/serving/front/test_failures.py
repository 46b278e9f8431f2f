"""What becomes of requests when replicas, clients or the front itself are killed, changed or overrun."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading

import httpx
import pytest
from fronts import CHAT, post, routed, version, wait_for
from fronts import pids as pids_of
from fronts import running as in_front
from load_generator import Load, Report, chat_body

from swift_dist.errors import RunError
from swift_dist.serving.front.haproxy import Front
from swift_dist.serving.front.state import FrontState, Replica, Version

BROKEN = {"type": "server_error", "param": None, "code": "stream_interrupted"}


def lines(front: Front) -> list[dict[str, object]]:
    """To be waited for: HAProxy writes one after the end of an answer, which its client may see earlier.

    Of requests that end at the same moment one may have none: a thread does not wait long for the other to write.
    """
    return [json.loads(line) for line in (front.folder / "access.jsonl").read_text().splitlines()]


def test_a_killed_replica_loses_no_request(make_upstream, make_front) -> None:
    """64 at a time, 1,000 in all; a third of the replicas goes with what it was doing."""
    replicas = [make_upstream(name) for name in "abc"]
    front = make_front(routed(version("v1", *replicas)))
    with Load(front.url, [chat_body("m", "x", delay=0.1)], concurrency=64, requests=1000).in_background() as running:
        running.wait_for(200)
        wait_for(lambda: replicas[0].seen()["running"] > 5)
        replicas[0].kill()
    report = running.report
    assert len(report.answers) == 1000 and not report.failures, report.describe()
    assert max(answer.seconds for answer in report.answers) < 30
    wait_for(lambda: any(line["retries"] != "0" and line["status"] == 200 for line in lines(front)))


def test_a_canary_that_is_killed_is_stood_in_for(make_upstream, make_front) -> None:
    """The only replica of a version: the other version answers what it was doing, and its share."""
    stable, canary = make_upstream("stable"), make_upstream("canary")
    front = make_front(routed(version("v1", stable, share=0.5), version("v2", canary, share=0.5)))
    with Load(front.url, [chat_body("m", "x", delay=0.05)], concurrency=32, requests=600).in_background() as running:
        running.wait_for(200)
        canary.kill()
        of_canary = Report(tuple(running.answers), 0.0).count("x-swift-version")["v2"]
    assert not running.report.failures, running.report.describe()
    assert running.report.count("x-swift-version")["v2"] <= of_canary + 32  # answered before, and not read yet


def test_a_dying_replica_answers_5xx(make_upstream, make_front) -> None:
    """Each request is executed at most `retries` + 1 times; what the last replica said is the answer."""
    replicas = [make_upstream(name) for name in "ab"]
    front = make_front(routed(version("v1", *replicas)), retries=2)
    answer = post(front, status=500)
    assert answer.status_code == 500 and answer.json()["choices"]
    assert sum(replica.seen()["began"] for replica in replicas) == 3
    for status in (400, 404, 422, 429):  # the request's own fault
        assert post(front, status=status).status_code == status
    assert sum(replica.seen()["began"] for replica in replicas) == 7


def test_a_stream_that_breaks_ends_with_an_error_event(make_upstream, make_front) -> None:
    front = make_front(routed(version("v1", make_upstream("a"))))
    with httpx.Client() as client, client.stream(
        "POST", front.url + CHAT, json=chat_body("m", "x", stream=True, events=9, delay=0.02, die_at=4)
    ) as answer:  # fmt: skip
        assert answer.status_code == 200
        events = answer.read().decode().strip().split("\n\n")  # raises where the body has no proper end
    assert len(events) == 5 and all(event.startswith('data: {"choices"') for event in events[:4])
    error = json.loads(events[4].removeprefix("data: "))["error"]
    assert error == {**BROKEN, "message": error["message"]} and "lost" in error["message"]
    wait_for(lambda: [line["ended"] for line in lines(front)] == ["SD"])


def test_the_openai_client_raises_for_a_broken_stream(make_upstream, make_front) -> None:
    import openai

    front = make_front(routed(version("v1", make_upstream("a"))))
    client = openai.OpenAI(base_url=front.url + "/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "x"}], stream=True, extra_body={"delay": 0.02, "die_at": 3}
    )
    with pytest.raises(openai.APIError, match="The replica that generated this answer was lost"):
        list(stream)


def test_streams_that_share_a_connection(make_upstream, make_front) -> None:
    """Whole streams and other answers before it on the connection do not matter, and nothing is added to them."""
    upstream = make_upstream("a")
    front = make_front(routed(version("v1", upstream)))
    with httpx.Client(timeout=20) as client:

        def ask(**body: object) -> str:
            return client.post(front.url + CHAT, json=chat_body("m", "x", **body)).text

        large = "0\\r\\n" * 1000  # text that looks like the end of a chunked body, over many chunks
        for _ in range(3):
            assert ask(stream=True).endswith("data: [DONE]\n\n")
            assert json.loads(ask())["choices"]
            assert ask(stream=True, say=large, events=300).count(large) == 300
        assert "stream_interrupted" in ask(stream=True, say=large, die_at=2, delay=0.02)
        with pytest.raises(httpx.HTTPError):
            client.post(front.url + CHAT, json=chat_body("m", "x")).raise_for_status()


def test_streams_that_did_not_begin_are_retried(make_upstream, make_front) -> None:
    replicas = [make_upstream(name) for name in "ab"]
    front = make_front(routed(version("v1", *replicas)))
    body = chat_body("m", "x", stream=True, held_at=0)
    with Load(front.url, [body], concurrency=16, requests=16).in_background() as running:
        wait_for(lambda: sum(replica.seen()["running"] for replica in replicas) == 16)
        assert replicas[0].seen()["running"] >= 7
        replicas[0].kill()
        replicas[1].release()
    assert replicas[1].seen()["began"] == 16
    assert len(running.report.good) == 16, running.report.describe()
    wait_for(lambda: {line["status"] for line in lines(front)} == {200})


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_seen_by_the_engine(make_upstream, make_front, stream: bool) -> None:
    upstream = make_upstream("a")
    front = make_front(routed(version("v1", upstream)))
    body = chat_body("m", "x", stream=stream, delay=0.05 if stream else 30, events=1000)
    text = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", front.options.port)) as client:
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        )
        client.sendall(head.encode() + text)
        wait_for(lambda: upstream.seen()["running"] == 1)
        if stream:
            assert client.recv(100).startswith(b"HTTP/1.1 200")
    wait_for(lambda: upstream.seen()["left"] == 1)
    wait_for(lambda: in_front(front, "v1") == 0)


def test_a_client_that_leaves_the_queue_is_never_executed(make_upstream, make_front) -> None:
    upstream = make_upstream("a")
    front = make_front(routed(version("v1", upstream)), max_concurrent=1)
    first = threading.Thread(target=post, args=(front,), kwargs={"held_at": 0})
    first.start()
    wait_for(lambda: upstream.seen()["running"] == 1)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(front.url + CHAT, json=chat_body("m", "x"), timeout=httpx.Timeout(30, read=0.3))
    wait_for(lambda: in_front(front, "v1") == 1)
    upstream.release()
    first.join()
    assert post(front).status_code == 200 and upstream.seen()["began"] == 2


def test_too_many_requests(make_upstream, make_front) -> None:
    """8 run, 8 wait (HAProxy's threads may look at the queue at once), the others are told to come back."""
    upstream = make_upstream("a")
    front = make_front(routed(version("v1", upstream)), max_concurrent=8, max_waiting=8, retry_after=7)
    with Load(front.url, [chat_body("m", "x", held_at=0)], concurrency=32, requests=32).in_background() as running:
        wait_for(lambda: len(running.failures) + in_front(front, "v1") == 32)
        assert upstream.seen()["began"] == 8
        upstream.release()
    assert 16 <= len(running.report.good) == upstream.seen()["began"] <= 18
    for answer in running.report.failures:
        assert answer.status == 429 and answer.headers["retry-after"] == "7"
        error = json.loads(answer.body)["error"]
        assert error["type"] == "rate_limit_error" and error["code"] == "rate_limit_exceeded"


def test_waiting_has_an_end(make_upstream, make_front) -> None:
    upstream = make_upstream("a")
    front = make_front(routed(version("v1", upstream)), max_concurrent=1, timeout_queue=1)
    with Load(front.url, [chat_body("m", "x", held_at=0)], concurrency=2, requests=2).in_background() as running:
        running.wait_for(1)
        upstream.release()
    (failure,) = running.report.failures
    assert failure.status == 503 and failure.headers["retry-after"] == "2" and 0.9 < failure.seconds < 20
    assert json.loads(failure.body)["error"]["code"] == "overloaded"


def test_silence_has_an_end(make_upstream, make_front) -> None:
    front = make_front(routed(version("v1", make_upstream("a"))), timeout_answer=1, timeout_stream=2)
    answer = post(front, held_at=0)
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
    assert "stream_interrupted" in post(front, stream=True, held_at=1).text
    assert post(front, stream=True, delay=0.5).text.endswith("data: [DONE]\n\n")  # 2.5 seconds in all


def test_a_client_that_waits_is_not_silent(make_upstream, make_front) -> None:
    """`timeout_client` is of clients that are to send or to read something."""
    front = make_front(routed(version("v1", make_upstream("a"))), timeout_client=1)
    report = Load(
        front.url, [chat_body("m", "x", delay=2.5), chat_body("m", "x", stream=True, delay=2.5, events=2)], 2, 2
    )
    answers = report.run()
    assert not answers.failures, answers.describe()
    with socket.create_connection(("127.0.0.1", front.options.port)) as client:
        client.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{{".encode()
        )
        assert client.recv(1000).startswith(b"HTTP/1.1 408")


def test_the_control_api_may_move(make_upstream, make_front) -> None:
    one, two = make_upstream("one"), make_upstream("two")
    state = routed(version("v1", one))
    front = make_front(FrontState(state.routes, (one.host, one.port)))
    assert httpx.get(front.url + "/v1/models").status_code == 200 and one.seen()["others"] == 1
    front.update(FrontState(state.routes, (two.host, two.port)))
    assert httpx.get(front.url + "/v1/models/m").json()["path"] == "/v1/models/m" and two.seen()["others"] == 1


def test_no_replica_is_ready(make_upstream, make_front) -> None:
    front = make_front(routed(version("v1")))
    answer = post(front)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "2"
    assert answer.json()["error"]["code"] == "no_replica_ready"
    upstream = make_upstream("a")
    front.update(routed(version("v1", upstream)))
    assert post(front).status_code == 200
    upstream.kill()
    wait_for(lambda: post(front).json()["error"]["code"] == "no_replica_ready")
    gone = httpx.get(front.url + "/health")
    assert gone.status_code == 503 and gone.json()["error"]["code"] == "control_unavailable"


def test_updates_under_load_fail_nothing(make_upstream, make_front) -> None:
    """Versions come and go while requests run and wait; each update is in force when it returns."""
    upstreams = [make_upstream(name) for name in "abcd"]
    front = make_front(routed(version("v0", *upstreams[:2])), max_concurrent=4)
    with Load(front.url, [chat_body("m", "x", delay=0.05)], concurrency=16).in_background() as running:
        for number in range(1, 13):
            pair = upstreams[number % 4], upstreams[(number + 1) % 4]
            front.update(routed(version(f"v{number}", *pair)))
            assert post(front).headers["x-swift-version"] == f"v{number}"
            front.ensure()
    assert not running.report.failures, running.report.describe()
    assert len(running.report.count("x-swift-version")) > 8
    wait_for(lambda: front.ensure() or all(in_front(front, f"v{n}") == 0 for n in range(12)))
    front.ensure()
    assert list(front._names.used) == ["v12"]


def test_what_waits_for_a_version_that_goes_is_answered_by_the_next(make_upstream, make_front) -> None:
    old, new = make_upstream("old"), make_upstream("new")
    front = make_front(routed(version("v1", old)), max_concurrent=1)
    with Load(front.url, [chat_body("m", "x", held_at=0)], concurrency=10, requests=10).in_background() as running:
        wait_for(lambda: in_front(front, "v1") == 10)
        front.update(routed(version("v2", new)))
        new.release()
        running.wait_for(9)
        assert in_front(front, "v1") == 1
        old.release()
    assert not running.report.failures, running.report.describe()
    assert running.report.count("x-swift-version") == {"v1": 1, "v2": 9}
    wait_for(lambda: in_front(front, "v1") == 0)


def test_a_state_without_a_meaning_changes_nothing(make_upstream, make_front) -> None:
    upstream = make_upstream("a")
    front = make_front(routed(version("v1", upstream)))
    for wrong in (version("v1", upstream, share=0.5), version("v1", upstream, upstream)):
        with pytest.raises(ValueError, match=r"sum to 1|given twice"):
            front.update(routed(wrong))
    assert post(front).status_code == 200


def test_a_killed_front_is_started_again(make_upstream, make_front) -> None:
    upstream = make_upstream("a")
    front = make_front(routed(version("v1", upstream)))
    front.update(routed(version("v2", upstream)))
    assert not front.ensure()
    os.kill(pids_of(front)[0], signal.SIGKILL)
    wait_for(lambda: not front.alive)
    assert front.ensure()
    assert post(front).headers["x-swift-version"] == "v2"


@pytest.mark.parametrize("noticed", [True, False])
def test_an_update_starts_a_killed_front(make_upstream, make_front, noticed: bool) -> None:
    front = make_front(routed(version("v1", make_upstream("a"))))
    os.kill(pids_of(front)[0], signal.SIGKILL)
    if noticed:
        wait_for(lambda: not front.alive)
    front.update(routed(version("v2", make_upstream("b"))))
    assert post(front).headers["x-swift-version"] == "v2"


def test_what_haproxy_says_is_in_the_error(make_upstream, make_front) -> None:
    with pytest.raises(RunError, match=r"(?s)did not start.*could not resolve address"):
        make_front(routed(Version("v1", (Replica("a", "no.such.name.invalid", 1),))))
