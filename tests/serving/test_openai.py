"""Every engine answers the same: one suite over the servers of vllm and hf (LMDeploy's needs a GPU)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai_suite
import pytest
from openai_reference import save_adapter, save_model
from openai_suite import CHECKS, EMBEDDING_CHECKS, Target
from process_tree import exists, gone_within

from swift_dist.lifetime import descendants
from swift_dist.serving.engines.choose import find_engine
from swift_dist.serving.engines.process import EngineProcess
from swift_dist.serving.options import EngineOptions, ServedModel

ENGINES = ("vllm", "hf")
# vLLM's is asked the same through a front in every run of the tests (test_deploy_vllm.py), there without a compilation
SERVERS = [pytest.param("vllm", marks=pytest.mark.table), "hf"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a start of vLLM takes minutes on a busy machine


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [save_adapter(model, folder / f"a{seed}", seed) for seed in range(3)]


def _start(name: str, served: ServedModel, folder: Path) -> EngineProcess:
    engine = find_engine(name)
    if why_not := engine.why_not():
        pytest.skip(why_not)
    engine.check(served)
    return EngineProcess(engine, served, log=folder / "engine.log").start()


def _target(process: EngineProcess, model: Path, adapters: list[Path]) -> Target:
    named = {name: Path(path) for name, path in process.served.adapters.items()}
    return Target(
        process.url,
        process.served.name,
        model,
        running=lambda: process.load().running,
        adapters=named,
        load_adapter=process.load_adapter,
        unload_adapter=process.unload_adapter,
        spare=adapters[2],
    )


@pytest.fixture(scope="module", params=SERVERS)
def server(request, model, adapters, tmp_path_factory) -> Iterator[EngineProcess]:
    options = EngineOptions(dtype="fp32", max_num_seqs=16, max_lora_rank=8, cpu_cache_gib=0.25)
    served = ServedModel("tiny", str(model), options, {"first": str(adapters[0]), "second": str(adapters[1])})
    with _start(request.param, served, tmp_path_factory.mktemp(request.param)) as process:
        yield process.wait_ready()


@pytest.fixture(scope="module", params=ENGINES)
def embedder(request, model, tmp_path_factory) -> Iterator[EngineProcess]:
    quick = {"cpu_cache_gib": 0.25, "engine_args": ("--enforce-eager",)} if request.param == "vllm" else {}
    options = EngineOptions(task="embed", dtype="fp32", **quick)  # vLLM compiles first without its flag
    served = ServedModel("tiny", str(model), options)
    with _start(request.param, served, tmp_path_factory.mktemp(f"{request.param}-embed")) as process:
        yield process.wait_ready()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_chat_server(server, model, adapters, check):
    check(_target(server, model, adapters))


def test_a_killed_worker_of_the_engine_ends_all_of_it(server):
    """The last test of a server: vLLM's EngineCore, or whatever is deepest in the tree."""
    pids = [server.pid, *descendants(server.pid)]
    core = [pid for pid in pids if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(core[0] if core else pids[-1], signal.SIGKILL)
    assert gone_within(pids, 10)
    assert not server.alive and server.exit_code == 137


@pytest.mark.parametrize("check", EMBEDDING_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_embedding_server(embedder, model, check):
    check(_target(embedder, model, [model] * 3))


def _two_ranks(model: Path, adapters: dict[str, str] | None = None) -> ServedModel:
    options = EngineOptions(dtype="fp32", cpu_cache_gib=0.25, tensor_parallel_size=2, max_lora_rank=8)
    return ServedModel("tiny", str(model), options, adapters or {})


def _workers(pids: list[int]) -> list[int]:
    return [pid for pid in pids if b"VLLM::Worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.table
def test_vllm_on_two_ranks(model, adapters, tmp_path):
    """--tensor_parallel_size 2, on a CPU: two workers, the same tokens; with one of them the whole engine ends."""
    with _start("vllm", _two_ranks(model, {"first": str(adapters[0])}), tmp_path) as process:
        target = _target(process.wait_ready(), model, adapters)
        for check in (openai_suite.check_greedy_is_transformers, openai_suite.check_adapters):
            check(target)
        pids = [process.pid, *descendants(process.pid)]
        workers = _workers(pids)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        assert gone_within(pids, 10)
        assert process.exit_code == 137


OWNER = """
import sys, time
from pathlib import Path
sys.path[:0] = {paths!r}
from test_openai import _start, _two_ranks
process = _start("vllm", _two_ranks(Path({model!r})), Path({folder!r})).wait_ready()
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.table
@pytest.mark.parametrize("victim", ["owner", "guard", "server"])
def test_nothing_of_vllm_survives(model, tmp_path, victim):
    """Kill -9 the process that started the engine (a replica's actor, `infer`), or one of those between it and vLLM."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent / "support")]
    code = OWNER.format(paths=paths, model=str(model), folder=str(tmp_path))
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout and owner.stdout.readline() == "ready\n"
        below = descendants(owner.pid)
        assert len(_workers(below)) == 2 and len(below) >= 6  # guard, server, EngineCore, multiprocessing's trackers
        began = time.monotonic()
        os.kill([owner.pid, *below][["owner", "guard", "server"].index(victim)], signal.SIGKILL)
        assert gone_within(below, 60), [pid for pid in below if exists(pid)]  # a busy machine; what is left stays
        print(f"{victim}: {len(below)} processes gone after {time.monotonic() - began:.1f} s")
    finally:
        owner.kill()  # and with it all that a failure left
        owner.communicate()
