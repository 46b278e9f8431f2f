"""`swift-dist deploy` as a user types it, the official client through HAProxy: what the suite of the engines asks.

The suite is that of test_openai.py, here with everything between a client and an engine; then the engine is killed.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployment import Deployment, wait_until
from load_generator import Load, chat_body
from openai_reference import save_adapter, save_model
from openai_suite import CHECKS, EMBEDDING_CHECKS, Target, check_adapters, check_greedy_is_transformers
from process_tree import gone_within

from swift_dist.serving.engines.choose import find_engine

# hf's server is asked the same without a front in every run of the tests (test_openai.py)
ENGINES = ["vllm", pytest.param("hf", marks=pytest.mark.table)]
EMBEDDERS = ["hf", pytest.param("vllm", marks=pytest.mark.table)]
SMALL = ("--dtype", "fp32", "--cpu_cache_gib", "0.25")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a start of vLLM takes minutes on a busy machine


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapters(model: Path) -> dict[str, Path]:
    return {name: save_adapter(model, model.parent / name, seed) for seed, name in enumerate(("first", "spare"))}


def _deploy(engine: str, folder: Path, *words: str) -> Deployment:
    if why_not := find_engine(engine).why_not():
        pytest.skip(why_not)
    # vLLM's own flag that spares the time of a compilation; hf keeps its cache elsewhere and refuses the size of one
    own = (*SMALL, "--engine_args=--enforce-eager") if engine == "vllm" else SMALL[:2]
    return Deployment(folder / "deployment", "--infer_backend", engine, *own, *words)


@pytest.fixture(scope="module", params=ENGINES)
def deployment(request, model, adapters, tmp_path_factory) -> Iterator[Deployment]:
    words = ["--model", str(model), "--adapters", f"first={adapters['first']}"]
    words += ["--adapter_root", str(model.parent), "--max_lora_rank", "8", "--max_num_seqs", "16"]
    with _deploy(request.param, tmp_path_factory.mktemp(request.param), *words) as running:
        yield running.wait_ready(600)


@pytest.fixture(scope="module", params=EMBEDDERS)
def embedder(request, model, tmp_path_factory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp(f"{request.param}-embed")
    with _deploy(request.param, folder, "--model", str(model), "--task", "embed") as running:
        yield running.wait_ready(600)


@pytest.fixture(scope="module")
def target(deployment: Deployment, model: Path, adapters: dict[str, Path]) -> Target:
    def change(*words: str) -> None:
        done = deployment.change(*words)
        assert done.returncode == 0, done.stderr

    return Target(
        deployment.url,
        "tiny",
        model,
        running=lambda: sum(replica["running"] for replica in deployment.replicas()),
        adapters={"first": adapters["first"]},
        load_adapter=lambda name, path: change("--load_adapter", f"{name}={path}"),
        unload_adapter=lambda name: change("--unload_adapter", name),
        spare=adapters["spare"],
    )


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_chat_through_the_front(target, check):
    check(target)


def test_a_killed_engine_of_the_only_replica(deployment, target):
    """What it was answering is refused as what may be tried again, and is not kept until the next replica is ready.

    All of the engine ends; what comes after the restart is answered as before, by the adapter too.
    """
    replica = deployment.wait_for(1, "tiny-v1")[0]
    tree = [*replica["pids"], *deployment.engine_pids(replica)]
    core = [pid for pid in tree if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    body = chat_body("tiny", "the red moon", max_tokens=6000, ignore_eos=True)
    with Load(deployment.url, [body], concurrency=8, requests=8).in_background() as running:
        wait_until(lambda: target.running() == 8, 60, "all of them run")
        os.kill(core[0] if core else tree[-1], signal.SIGKILL)
        assert gone_within(tree[1:], 10)
    assert {found["id"] for found in deployment.replicas()} <= {replica["id"]}, "there is no other yet"
    for answer in running.report.answers:
        assert answer.status in (502, 503) and answer.headers["retry-after"], running.report.describe()
        assert json.loads(answer.body)["error"]["code"] in ("replica_failed", "overloaded", "no_replica_ready")
    wait_until(lambda: deployment.replicas() and deployment.replicas()[0]["id"] != replica["id"], 400, "another one")
    assert gone_within(tree, 10)
    check_greedy_is_transformers(target)
    check_adapters(target)


@pytest.mark.parametrize("check", EMBEDDING_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_embeddings_through_the_front(embedder, model, check):
    check(Target(embedder.url, "tiny", model, running=lambda: 0))
