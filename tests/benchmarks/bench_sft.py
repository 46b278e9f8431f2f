"""Fine-tuning against TRL's SFTTrainer: tokens a second on two ranks, DDP over gloo, fp32, each as a user starts it.

    python tests/benchmarks/bench_sft.py [--steps 12] [--turns 3] [--check]

The same llama (random weights), the same conversations with the same tokens learning, the same samples in the same
micro-batches of the same ranks, AdamW, learning rates and clipping. Lengths are log-normal, as those of conversations
are: most are short, a few are long. (How full `data.packing` fills its samples: `bench_packing.py`.) The kinds take
turns, so that what else the machine does falls on all alike; ratios are taken within a turn, the median counts.

    swift-dist       as it comes: no padding
    TRL              as it comes: padded to the longest of the micro-batch; without gradient checkpointing (its default)
    TRL padding-free padding_free: one row, and by transformers' SDPA a [T, T] mask

Either takes the mean over the learning tokens of the whole global batch: ours divides by the sum of weights over all
ranks and micro-batches, TRL by ``num_items_in_batch``, which accelerate gathers, and multiplies by the number of ranks
because DDP averages. So the curves must be the same up to fp32 rounding; a run whose losses are further apart than
`SAME` fails, with or without --check.

A step's seconds count from the end of the one before (TRL), or from the moment its data is asked for (ours); the first
`WARM` steps are left out. Tokens are those of the samples: padding is none. Memory is the largest resident size of rank
0 before anything is saved.
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

LIMIT = 1.4
"""Least tokens a second, as a multiple of TRL's as it comes."""
SAME = 1e-4
"""Largest relative difference of a step's losses."""
RANKS, MICRO_BATCH, GLOBAL_BATCH, LONGEST, WARM = 2, 8, 32, 1024, 3
LR, WEIGHT_DECAY, BETAS, EPS, CLIP = 1e-3, 0.1, (0.9, 0.95), 1e-8, 1.0
MODEL = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.02,
}
BIN = Path(sys.executable).parent
KINDS = ("swift-dist", "TRL", "TRL padding-free")


def conversations(count: int) -> list[dict[str, Any]]:
    """Of one round; words of prompt and answer are log-normal: medians 40 and 60, sigma 1, at most six medians."""
    import chat_model

    rng = random.Random(0)

    def words(median: int) -> str:
        number = min(max(2, round(median * rng.lognormvariate(0, 1))), 6 * median)
        return chat_model.sentence(rng, number, number)

    return [
        {"messages": [{"role": "user", "content": words(40)}, {"role": "assistant", "content": words(60)}]}
        for _ in range(count)
    ]


def words_of(folder: Path, steps: int) -> list[str]:
    """The command line's words of our job, without the run folder."""
    values = {
        "model": folder / "model",
        "dataset": folder / "rows.jsonl",
        "data.cache": folder / "cache",
        "max_length": LONGEST,
        "train.steps": steps,
        "train.micro_batch_size": MICRO_BATCH,
        "train.global_batch_size": GLOBAL_BATCH,
        "train.precision": "fp32",
        "optimizer.lr": LR,
        "optimizer.weight_decay": WEIGHT_DECAY,
        "optimizer.betas": list(BETAS),
        "optimizer.eps": EPS,
        "optimizer.clip_grad": CLIP,
        "schedule.name": "linear",
        "schedule.min_lr_ratio": 0.0,
        "report.tensorboard": "false",
        "nproc_per_node": RANKS,
    }
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def samples(folder: Path, steps: int) -> list[dict[str, list[int]]]:
    """What our ranks will learn from, in the order in which TRL's will take it."""
    from swift_dist.config.load import load_job
    from swift_dist.data.samples.opening import open_samples
    from swift_dist.resolve import resolve

    job = load_job(None, words_of(folder, steps), task="sft")
    resolved = resolve(job, nproc_per_node=RANKS, on_cuda=False, output=str(folder / "none"))
    values = resolved.payload()["samples"]
    ranks = [
        open_samples(values, resolved.job, dp_rank=rank, dp_size=RANKS, layout="padded", pad_id=1)
        for rank in range(RANKS)
    ]
    found = []
    for step in range(steps):
        for micro_batches in zip(*(data.micro_batches(step) for data in ranks), strict=True):
            for batch in micro_batches:
                for row, length in enumerate(batch["lengths"].tolist()):
                    ids, weights = batch["tokens"][row, :length].tolist(), batch["weights"][row, : length - 1].tolist()
                    assert set(weights) <= {0.0, 1.0}, "TRL knows no other weights"
                    labels = [-100, *(i if w else -100 for i, w in zip(ids[1:], weights, strict=True))]
                    found.append({"input_ids": ids, "labels": labels})
    for data in ranks:
        data.close()
    return found


def run(command: list[str | Path]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")


def ours(folder: Path, steps: int, output: Path) -> dict[str, Any]:
    run([BIN / "swift-dist", "sft", *words_of(folder, steps), "--launcher", "torchrun", "--output", output])
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    return {
        "seconds": sum(row["step_seconds"] for row in rows[WARM:]),
        "tokens": [row["tokens"] for row in rows],
        "losses": [row["loss"] for row in rows],
        "memory_gib": rows[-1]["memory_gib"],
    }


def trl(folder: Path, steps: int, output: Path, padding_free: bool) -> dict[str, Any]:
    output.mkdir()
    case = {
        "model": str(folder / "model"),
        "samples": json.loads((folder / "samples.json").read_text()),
        "padding_free": padding_free,
        "output": str(output),
        "result": str(output / "result.json"),
        "arguments": {
            "max_steps": steps,
            "per_device_train_batch_size": MICRO_BATCH,
            "gradient_accumulation_steps": GLOBAL_BATCH // (MICRO_BATCH * RANKS),
            "learning_rate": LR,
            "lr_scheduler_type": "linear",
            "weight_decay": WEIGHT_DECAY,
            "adam_beta1": BETAS[0],
            "adam_beta2": BETAS[1],
            "adam_epsilon": EPS,
            "max_grad_norm": CLIP,
        },
    }
    (output / "case.json").write_text(json.dumps(case))
    script = Path(__file__).with_name("sft_trl.py")
    run([BIN / "torchrun", "--standalone", "--nproc-per-node", str(RANKS), script, output / "case.json"])
    found = json.loads((output / "result.json").read_text())
    return {**found, "seconds": found["ends"][-1] - found["ends"][WARM - 1]}


def measure(folder: Path, steps: int, turns: int) -> dict[str, list[dict[str, Any]]]:
    """Results of each kind, by turn."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for turn in range(turns):
        for kind in KINDS if turn % 2 else reversed(KINDS):
            output = folder / f"{kind.replace(' ', '-')}-{turn}"
            if kind == "swift-dist":
                found[kind].append(ours(folder, steps, output))
            else:
                found[kind].append(trl(folder, steps, output, kind != "TRL"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="fail below the ratio")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        import chat_model

        folder = Path(name)
        chat_model.save_chat_model(folder / "model", **MODEL)
        chat_model.save_rows(folder / "rows.jsonl", conversations(given.steps * GLOBAL_BATCH + 64))
        (folder / "samples.json").write_text(json.dumps(samples(folder, given.steps)))
        lengths = [len(sample["input_ids"]) for sample in json.loads((folder / "samples.json").read_text())]
        found = measure(folder, given.steps, given.turns)
    report = summary(found, lengths)
    print(json.dumps(report, indent=1))
    same = max(report["largest_difference_of_losses"].values()) <= SAME
    return 0 if same and (report["ratio"]["TRL"] >= LIMIT or not given.check) else 1


def summary(found: dict[str, list[dict[str, Any]]], lengths: list[int]) -> dict[str, Any]:
    mine = found["swift-dist"]
    tokens = sum(mine[0]["tokens"][WARM:])
    assert sum(mine[0]["tokens"]) == sum(lengths), "both see the same samples"
    groups = [lengths[start : start + MICRO_BATCH] for start in range(0, len(lengths), MICRO_BATCH)]
    padded = sum(max(group) * len(group) for group in groups)
    ratios = {
        kind: [theirs["seconds"] / own["seconds"] for theirs, own in zip(found[kind], mine, strict=True)]
        for kind in KINDS[1:]
    }
    return {
        "tokens_per_second": {k: round(tokens / statistics.median(r["seconds"] for r in v)) for k, v in found.items()},
        "ratio": {kind: round(statistics.median(values), 3) for kind, values in ratios.items()},
        "ratios": {kind: [round(value, 3) for value in values] for kind, values in ratios.items()},
        "limit": LIMIT,
        "largest_difference_of_losses": {
            kind: max(
                abs(a - b) / b
                for theirs in found[kind]
                for a, b in zip(mine[0]["losses"], theirs["losses"], strict=True)
            )
            for kind in KINDS[1:]
        },
        "first_and_last_loss": [round(mine[0]["losses"][0], 4), round(mine[0]["losses"][-1], 4)],
        "memory_gib": {kind: round(max(r["memory_gib"] for r in values), 3) for kind, values in found.items()},
        "lengths": {"median": statistics.median(lengths), "longest": max(lengths)},
        "padding": round(1 - sum(lengths) / padded, 3),
        "load": os.getloadavg(),
    }


if __name__ == "__main__":
    sys.exit(main())
