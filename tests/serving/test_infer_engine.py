"""`swift_dist.Engine` for embeddings and with replicas."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_model import save_chat_model
from openai_reference import reference, save_model
from process_tree import gone_within

import swift_dist
from swift_dist.errors import JobError, RunError
from swift_dist.lifetime import descendants

HF = {"infer_backend": "hf", "dtype": "fp32"}


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(HF, id="hf"),
        pytest.param(
            {"infer_backend": "vllm", "dtype": "fp32", "cpu_cache_gib": 0.25, "engine_args": "--enforce-eager"},
            marks=[pytest.mark.table, pytest.mark.timeout(900)],
            id="vllm",
        ),
    ],
)
def test_embeddings(tmp_path: Path, keys: dict[str, Any]) -> None:
    """The hidden state of the last token, of length 1."""
    import torch

    model, texts = save_model(tmp_path / "tiny"), ["the red moon is bright.", "seven", "quiet window " * 10]
    with swift_dist.Engine(str(model), task="embed", **keys) as engine:
        found = engine.embed(texts)
        assert engine.embed(texts[1:2])[0] == pytest.approx(found[1], abs=1e-5)
    plain = reference(model)
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            hidden = plain.model.model(torch.tensor([plain.tokenizer(text)["input_ids"]])).last_hidden_state[0, -1]
        assert vector == pytest.approx(torch.nn.functional.normalize(hidden, dim=0).tolist(), abs=1e-4)


def test_a_model_of_text_embeds_nothing(engine: swift_dist.Engine) -> None:
    with pytest.raises(RunError, match='task="embed"'):
        engine.embed(["x"])


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[swift_dist.Engine]:
    model = save_chat_model(tmp_path_factory.mktemp("m") / "tiny", initializer_range=0.1, max_position_embeddings=4096)
    with swift_dist.Engine(str(model), replicas=2, **HF) as engine:
        yield engine
        servers = [replica.process.pid for replica in engine._replicas]
        pids = [pid for server in servers for pid in (server, *descendants(server))]
    assert len(pids) >= 4 and gone_within(pids, 10)  # of each its guard and its server


def served(engine: swift_dist.Engine) -> list[bool]:
    """Which replicas have answered, or do."""
    import httpx

    found = []
    for replica in engine._replicas:
        lines = httpx.get(f"{replica.process.url}/metrics", trust_env=False, timeout=60).text.splitlines()
        found.append(any(x.startswith("swift_dist:generation_tokens_total") and not x.endswith(" 0.0") for x in lines))
    return found


def test_a_batch_is_shared_by_replicas(engine: swift_dist.Engine) -> None:
    items = [f"the moon {number}" for number in range(20)]
    answers = engine.batch(items, max_tokens=8, temperature=0, concurrency=4)
    assert served(engine) == [True, True]
    alone = [engine.chat(item, max_tokens=8, temperature=0).choices[0].message.content for item in items[:4]]
    assert [answer.choices[0].message.content for answer in answers][:4] == alone


def test_a_batch_loses_nothing_with_a_replica(engine: swift_dist.Engine) -> None:
    """The killed one is there again, and stays when the batch has ended."""
    killed = engine._replicas[1].process.pid
    items, found = [f"silver {number}" for number in range(12)], []

    def ask() -> None:
        found.extend(engine.batch(items, max_tokens=300, temperature=0, concurrency=4))

    batch = threading.Thread(target=ask)
    batch.start()
    deadline = time.monotonic() + 60
    while not all(replica.process.load().running for replica in engine._replicas):
        assert batch.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(killed, signal.SIGKILL)
    batch.join(240)
    assert len(found) == 12
    again = engine.batch(items, max_tokens=3, temperature=0, concurrency=4)
    assert [a.choices[0].message.content for a in again] == [
        engine.chat(item, max_tokens=3, temperature=0).choices[0].message.content for item in items
    ]


def test_engines_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="replicas"):
        swift_dist.Engine(str(tmp_path), replicas=0)
    with pytest.raises(JobError, match="did you mean"):
        swift_dist.Engine(str(tmp_path), replica=2)
