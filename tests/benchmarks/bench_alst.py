"""Sequences on several ranks: our engine against DeepSpeed's ALST, in time and memory of a rank, the same work in each.

    python tests/benchmarks/bench_alst.py [--ranks 2] [--length 4096] [--steps 6] [--turns 3] [--check]

The same llama (random weights, fp32), the same samples, one a step, AdamW, rates and clipping; one thread a rank, gloo,
every layer recomputed, weights sharded (ALST: ZeRO-3, configured as ours; ours: ZeRO-3 and FSDP2).

    ours zero3, ours fsdp2   `swift-dist sft --sequence_parallel_size N --train.recompute full`, as it comes
    ALST                     as its tutorial has it (`length_alst.py`)
    ALST tiled               with its TiledFusedLogitsLoss and TiledMLP
    ours zero3 plain         train.tiled_loss and train.tiled_mlp false: what ALST without tiles does

A run whose losses, or whose first gradient's norm, are further from the first kind's than `SAME` fails,
with or without --check. The kinds take turns, in another direction each turn; a step's seconds are the median of those
behind the first `WARM`; ratios (ours by ALST's: tiles by tiles, plain by plain) are taken within a turn; medians count.
CPU seconds are of rank 0 with gloo's threads; they say more than seconds on a busy machine, or with more ranks
than cores.
Memory is the peak resident size of rank 0 beyond what it is before the first step: gradients, AdamW's state and
activations.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

SAME = 1e-5
"""Largest relative difference of a step's loss, and of the first gradient's norm."""
WARM = 1
LR, BETAS, EPS, CLIP = 1e-3, (0.9, 0.95), 1e-8, 1.0
MODEL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "initializer_range": 0.02,
}
PLAIN = {"train.tiled_loss": "false", "train.tiled_mlp": "false"}
OURS: dict[str, dict[str, str]] = {
    "ours zero3": {"deepspeed": "zero3"},
    "ours fsdp2": {"fsdp": "fsdp2"},
    "ours zero3 plain": {"deepspeed": "zero3", **PLAIN},
}
THEIRS = {"ALST": False, "ALST tiled": True}
PAIRS = {"ours zero3": "ALST tiled", "ours fsdp2": "ALST tiled", "ours zero3 plain": "ALST"}
KINDS = (*OURS, *THEIRS)
TORCHRUN = Path(sys.executable).with_name("torchrun")


def save_rows(folder: Path, count: int, length: int) -> None:
    """Short questions with answers that are cut off at the length: ALST's adapter gathers samples of one length alone
    over gloo."""
    import chat_model

    rng = random.Random(0)
    rows = [
        {
            "messages": [
                {"role": "user", "content": chat_model.sentence(rng)},
                {"role": "assistant", "content": chat_model.sentence(rng, length, length)},
            ]
        }
        for _ in range(count)
    ]
    chat_model.save_rows(folder / f"rows-{length}.jsonl", rows)


def payload_of(folder: Path, changes: dict[str, str], ranks: int, length: int, steps: int, output: Path) -> Any:
    """The resolved job, as its ranks read it, and the samples in the order of its steps."""
    from swift_dist.config.load import load_job
    from swift_dist.resolve import resolve

    values = {
        "model": folder / "model",
        "dataset": folder / f"rows-{length}.jsonl",
        "data.cache": folder / "cache",
        "max_length": length,
        "template.truncation": "right",
        "sequence_parallel_size": ranks,
        "train.steps": steps,
        "train.micro_batch_size": 1,
        "train.global_batch_size": 1,
        "train.precision": "fp32",
        "train.recompute": "full",
        "optimizer.lr": LR,
        "optimizer.weight_decay": 0.0,
        "optimizer.betas": list(BETAS),
        "optimizer.eps": EPS,
        "optimizer.clip_grad": CLIP,
        "schedule.name": "constant",
        "report.tensorboard": "false",
        "nproc_per_node": ranks,
        **changes,
    }
    job = load_job(None, [word for key, value in values.items() for word in (f"--{key}", str(value))], task="sft")
    return resolve(job, nproc_per_node=ranks, on_cuda=False, output=str(output))


def samples_of(resolved: Any, steps: int) -> list[dict[str, list[int]]]:
    from swift_dist.data.samples.opening import open_samples

    values = resolved.payload()["samples"]
    data = open_samples(values, resolved.job, dp_rank=0, dp_size=1, layout="padded", pad_id=1)
    found = []
    for step in range(steps):
        (batch,) = data.micro_batches(step)
        count = int(batch["lengths"][0])
        ids, weights = batch["tokens"][0, :count].tolist(), batch["weights"][0, : count - 1].tolist()
        labels = [-100, *(i if w else -100 for i, w in zip(ids[1:], weights, strict=True))]
        found.append({"input_ids": ids, "labels": labels})
    data.close()
    return found


def run(folder: Path, kind: str, ranks: int, length: int, steps: int, name: str) -> dict[str, Any]:
    """What rank 0 of a kind measured."""
    from swift_dist.engines.hf.strategies._deepspeed_config import settings

    output = folder / name
    output.mkdir()
    case: dict[str, Any] = {"output": str(output), "result": str(output / "result.json")}
    if kind in OURS:
        case["payload"] = payload_of(folder, OURS[kind], ranks, length, steps, output).payload()
    else:
        resolved = payload_of(folder, OURS["ours zero3"], ranks, length, steps, output)
        case |= {
            "model": str(folder / "model"),
            "samples": samples_of(resolved, -(-steps // ranks) * ranks),
            "tiled": THEIRS[kind],
            "steps": steps,
            "clip": CLIP,
            "zero": settings(resolved.job, hidden_size=MODEL["hidden_size"], data_parallel_size=ranks)[
                "zero_optimization"
            ],
            "adamw": {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": 0.0},
        }
    (output / "case.json").write_text(json.dumps(case))
    script = Path(__file__).with_name("length_ours.py" if kind in OURS else "length_alst.py")
    command = [str(TORCHRUN), "--standalone", "--nproc-per-node", str(ranks), str(script), str(output / "case.json")]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}")
    found: dict[str, Any] = json.loads((output / "result.json").read_text())
    print(f"{name}: {statistics.median(found['seconds'][WARM:]):.2f} s a step", file=sys.stderr)
    return found


def measure(folder: Path, ranks: int, length: int, steps: int, turns: int) -> dict[str, list[dict[str, Any]]]:
    """Results of each kind, by turn."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for turn in range(turns):
        for kind in KINDS if turn % 2 else reversed(KINDS):
            found[kind].append(run(folder, kind, ranks, length, steps, f"{kind.replace(' ', '-')}-{turn}"))
    return found


def apart(found: dict[str, list[dict[str, Any]]]) -> tuple[float, float]:
    """Largest relative differences of a step's loss, and of the first step's gradient norm, from the first kind's."""
    right = found[KINDS[0]][0]
    runs = [result for results in found.values() for result in results]
    losses = max(abs(a - b) / b for result in runs for a, b in zip(result["losses"], right["losses"], strict=True))
    return losses, max(abs(result["norm"] - right["norm"]) / right["norm"] for result in runs)


def median_of(result: dict[str, Any], name: str) -> float:
    return statistics.median(result[name][WARM:]) if name != "memory_gib" else result[name]


def ratio(found: dict[str, list[dict[str, Any]]], kind: str, name: str) -> float:
    pairs = zip(found[kind], found[PAIRS[kind]], strict=True)
    return statistics.median(median_of(own, name) / median_of(theirs, name) for own, theirs in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="fail where a ratio is beyond 1")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        import chat_model

        folder = Path(name)
        chat_model.save_chat_model(folder / "model", **MODEL, max_position_embeddings=given.length)
        save_rows(folder, given.steps + 8, given.length)
        found = measure(folder, given.ranks, given.length, given.steps, given.turns)
    names = ("seconds", "cpu_seconds", "memory_gib")
    print("| | seconds a step | CPU seconds | memory of a step, GiB | ratios, ours by ALST's |\n|---|---|---|---|---|")
    over = False
    for kind, results in found.items():
        values = [f"{statistics.median(median_of(result, name) for result in results):.2f}" for name in names]
        ratios = [ratio(found, kind, name) for name in names] if kind in PAIRS else []
        over |= max(ratios, default=0.0) > 1
        words = f"{', '.join(f'{value:.2f}' for value in ratios)} ({PAIRS[kind]})" if ratios else ""
        print(f"| {kind} | {' | '.join(values)} | {words} |")
    losses, norms = apart(found)
    print(f"losses apart by {losses:.1e}, gradient norms by {norms:.1e}; load {os.getloadavg()[0]:.1f}")
    return int(losses > SAME or norms > SAME or (given.check and over))


if __name__ == "__main__":
    sys.exit(main())
