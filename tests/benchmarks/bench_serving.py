"""Serving: `swift-dist deploy --infer_backend vllm` against `vllm serve` of the same model with the same flags.

    python tests/benchmarks/bench_serving.py [--quick] [--turns 3] [--json FILE] [--check] [--control]

A llama with random weights whose decode step takes a CPU 20 ms or more (`MODEL`: 89 M parameters, fp32; measured and
printed): with a toy the ratio would say only how the processes share the cores. Both servers run all the time and take
turns at answering, first one and then the other first, so what else the machine does falls on both. A load is closed:
N streams, each of which sends its next request when its last was answered; prompts of `PROMPT` tokens, none like
another, and answers of exactly `ANSWER` tokens. Ratios are taken within a turn, and the median over turns counts.

    tokens/s     answers' tokens by the seconds of the load
    TTFT         from sending a request to its first token, p50 and p99 over the requests of a turn
    gap          between neighbouring tokens of a stream, p50 and p99

Where the time goes: seconds of CPU that each kind of process used during the loads, by answered token. The client is
this process. Greedy answers of both sides must be the same text, and no request may fail, or the script does.

`--control` puts a second `vllm serve` in the deployment's place: how far two starts of the same command differ.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import psutil
from load_generator import Load, Report, completion_body, percentile

LEAST_TOKENS, MOST_TTFT = 0.9, 1.25
"""Tokens a second at 64 streams and median time to the first token at each level, as multiples of vLLM's own."""
REQUESTS = {1: 6, 16: 48, 64: 192}
"""Of a turn, by the number of streams."""
PROMPT, ANSWER = 48, 48
MODEL = {
    "hidden_size": 768,
    "intermediate_size": 2112,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
}
NAME = "bench"
FLAGS = {"dtype": "fp32", "max_model_len": 256, "max_num_seqs": 64}
OURS, THEIRS = "swift-dist deploy", "vllm serve"
KINDS = {
    "ray::ServeReplica": "replicas' actors",
    "ray::Controller": "the controller",
    "ray::ServeController": "Serve's controller",
    "_guard": "guards of engines",
    " deploy ": "the driver",
    "raylet/raylet": "raylet",
    "gcs_server": "Ray's GCS",
    "Agent": "Ray's agents",
}
"""What a command line says of a process that is no engine's -> what the table calls it."""
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Side:
    """A server under load. `root`: the process below which all of it runs."""

    name: str
    url: str
    root: int


@contextlib.contextmanager
def vllm_serve(folder: Path, name: str = THEIRS) -> Iterator[Side]:
    """The command of a replica, by itself."""
    from swift_dist.plugins import find
    from swift_dist.serving.engines.process import EngineProcess
    from swift_dist.serving.options import EngineOptions, ServedModel

    served = ServedModel(NAME, str(folder / "model"), EngineOptions(infer_backend="vllm", **FLAGS))
    with EngineProcess(
        find("swift_dist.serving.engines", "vllm", "ENGINE"), served, log=folder / f"{name}.log"
    ) as process:
        process.start().wait_ready()
        assert process.pid is not None
        yield Side(name, process.url, process.pid)


@contextlib.contextmanager
def deployment(folder: Path) -> Iterator[Side]:
    """One replica behind the front."""
    output = folder / "deployment"
    words = [f"--{key}={value}" for key, value in FLAGS.items()]
    words += ["--model", str(folder / "model"), "--served_model_name", NAME, "--infer_backend", "vllm"]
    with (folder / "deploy.log").open("wb") as log:
        process = subprocess.Popen(
            [BIN / "swift-dist", "deploy", *words, "--port", str(free_port()), "--output", output],
            stdout=log,
            stderr=log,
        )
    try:
        yield Side(OURS, until_ready(output, process, folder / "deploy.log"), process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until_ready(output: Path, process: subprocess.Popen[bytes], log: Path) -> str:
    """The address, once the deployment answers."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, KeyError):
            found = json.loads((output / "deployment.json").read_text())
            if found["state"] == "ready":
                return str(found["address"]).removesuffix("/v1")
        if process.poll() is not None:
            break
        time.sleep(0.5)
    raise SystemExit(f"the deployment did not become ready:\n{log.read_text()[-4000:]}")


def body(index: int, **more: Any) -> dict[str, Any]:
    """Request number `index`: a prompt that no other begins like, so nothing is taken from a prefix cache."""
    prompt = [10 + (index * 7919 + place * place * 31) % 300 for place in range(PROMPT)]
    prompt[:3] = [10 + index % 300, 10 + index // 300 % 300, 10 + index % 297]
    return completion_body(NAME, prompt, max_tokens=ANSWER, temperature=0, ignore_eos=True, **more)


def cpu_seconds(root: int) -> Counter[str]:
    """Of every process below `root` (and itself), by kind, since it started."""
    seconds: Counter[str] = Counter()
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(root)
        for process in (top, *top.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                seconds[kind(process)] += times.user + times.system
    return seconds


def kind(process: psutil.Process) -> str:
    words = " ".join(process.cmdline()) or process.name()
    for title, name in (("VLLM::Worker", "vLLM's worker (the model)"), ("VLLM::EngineCore", "vLLM's scheduler")):
        if title in words:
            return name
    if process.name().startswith("haproxy"):
        return "HAProxy"
    if ("_vllm_server" in words or "VLLM::APIServer" in words) and "_guard" not in words:
        return "vLLM's API server"
    return next((name for sign, name in KINDS.items() if sign in words), "the rest of Ray")


def one_load(side: Side, streams: int, requests: int, first: int) -> dict[str, Any]:
    """One turn of one side: what a user sees, and the CPU seconds that it took."""
    before, mine = cpu_seconds(side.root), time.process_time()
    load = Load(side.url, lambda i: body(first + i, stream=True), streams, requests, timeout=600)
    report: Report = load.run()
    mine = time.process_time() - mine
    if report.failures:
        raise SystemExit(f"{side.name}: {report.describe()}")
    used = cpu_seconds(side.root)
    used.subtract(before)
    waits, gaps = [answer.first_event_seconds for answer in report.good], report.gaps
    return {
        "tokens_per_second": requests * ANSWER / report.seconds,
        "ttft_p50": percentile(waits, 50),
        "ttft_p99": percentile(waits, 99),
        "gap_p50": percentile(gaps, 50),
        "gap_p99": percentile(gaps, 99),
        "cpu_ms_per_token": {k: 1000 * v / requests / ANSWER for k, v in {**used, "this client": mine}.items()},
    }


def measure(sides: Sequence[Side], turns: int, requests: dict[int, int]) -> dict[int, dict[str, list[dict[str, Any]]]]:
    """Streams -> side -> what each turn found. Of the sides the first is the reference."""
    found: dict[int, dict[str, list[dict[str, Any]]]] = {n: {side.name: [] for side in sides} for n in requests}
    first = 0
    for side in sides:  # warm
        one_load(side, 8, 16, first := first + 16)
    for turn in range(turns):
        for streams, count in requests.items():
            for side in sides if turn % 2 else reversed(sides):
                one = one_load(side, streams, count, first := first + count)
                found[streams][side.name].append(one)
                speed = f"{one['tokens_per_second']:.0f} tokens/s"
                print(f"turn {turn + 1}, {streams} streams, {side.name}: {speed}", file=sys.stderr)
    return found


def same_answers(sides: Sequence[Side]) -> None:
    texts = []
    for side in sides:
        report = Load(side.url, [body(1_000_000)], 1, 1, keep=True).run()
        if report.failures:
            raise SystemExit(f"{side.name}: {report.describe()}")
        texts.append(json.loads(report.answers[0].body)["choices"][0]["text"])
    if len(set(texts)) != 1 or not texts[0]:
        raise SystemExit(f"the sides do not answer the same: {texts}")


def summary(found: dict[int, dict[str, list[dict[str, Any]]]]) -> dict[int, dict[str, float]]:
    """Streams -> figure -> median over turns of ours by theirs."""
    figures = ("tokens_per_second", "ttft_p50", "ttft_p99", "gap_p50", "gap_p99")
    return {
        streams: {
            figure: statistics.median(
                ours[figure] / (theirs[figure] or math.nan)  # a gap is 0 where tokens came together
                for theirs, ours in zip(*sides.values(), strict=True)
            )
            for figure in figures
        }
        for streams, sides in found.items()
    }  # fmt: skip


def show(found: dict[int, dict[str, list[dict[str, Any]]]], ratios: dict[int, dict[str, float]]) -> None:
    def middle(streams: int, side: str, figure: str) -> float:
        return statistics.median(turn[figure] for turn in found[streams][side])

    print(f"decode step with one stream: {1000 * middle(min(found), THEIRS, 'gap_p50'):.0f} ms\n")
    print("| streams | side | tokens/s | TTFT p50, ms | TTFT p99 | gap p50, ms | gap p99 |")
    print("|---|---|---|---|---|---|---|")
    for streams, sides in found.items():
        for side in sides:
            cells = [f"{middle(streams, side, 'tokens_per_second'):.0f}"]
            cells += [f"{1000 * middle(streams, side, f):.0f}" for f in ("ttft_p50", "ttft_p99", "gap_p50", "gap_p99")]
            print(f"| {streams} | {side} | {' | '.join(cells)} |")
        print(f"| {streams} | ratio | {' | '.join(f'{value:.2f}' for value in ratios[streams].values())} |")
    print("\n| CPU ms a token | " + " | ".join(f"{s} streams: {side}" for s, sides in found.items() for side in sides))
    kinds = sorted(
        {k for sides in found.values() for turns in sides.values() for t in turns for k in t["cpu_ms_per_token"]}
    )
    print("|---" * (1 + 2 * len(found)) + "|")
    for name in kinds:
        cells = [
            f"{statistics.median(turn['cpu_ms_per_token'].get(name, 0.0) for turn in turns):.2f}"
            for sides in found.values()
            for turns in sides.values()
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one turn of a third of the requests")
    parser.add_argument("--json", type=Path, help="write all turns there")
    parser.add_argument("--check", action="store_true", help="fail outside the limits")
    parser.add_argument("--control", action="store_true", help=f"{THEIRS} against {THEIRS}")
    given = parser.parse_args()
    turns = 1 if given.quick else given.turns
    requests = {n: max(n, count // 3) for n, count in REQUESTS.items()} if given.quick else REQUESTS
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as name:
        import chat_model

        folder = Path(name)
        chat_model.save_chat_model(folder / "model", **MODEL)
        other = vllm_serve(folder, f"{THEIRS} again") if given.control else deployment(folder)
        with vllm_serve(folder) as theirs, other as ours:
            same_answers([theirs, ours])
            found = measure([theirs, ours], turns, requests)
    ratios = summary(found)
    show(found, ratios)
    if given.json:
        given.json.write_text(json.dumps({"turns": found, "ratios": ratios, "cores": os.cpu_count()}, indent=2))
    good = ratios[64]["tokens_per_second"] >= LEAST_TOKENS and all(r["ttft_p50"] <= MOST_TTFT for r in ratios.values())
    print(
        f"\nlimits: tokens/s at 64 streams >= {LEAST_TOKENS}, TTFT p50 <= {MOST_TTFT}: {'kept' if good else 'not kept'}"
    )
    return 0 if good or not given.check else 1


if __name__ == "__main__":
    sys.exit(main())
