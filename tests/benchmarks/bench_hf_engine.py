"""Tokens a second of the hf engine's generator against transformers' own `generate` with a static batch.

The same model in the same process, fp32, greedy, at 1, 16 and 64 concurrent requests: once with prompts and answers of
one length, where a static batch wastes nothing, once with answers of different lengths, where it computes until the
longest is done (only tokens that were asked for count). Runs alternate; each pair gives one ratio; printed is the
median, of wall clock and of CPU seconds (on a machine with other work the steadier one). To be at least 0.9 at 16 and
64 with equal lengths, and more than 1 with different ones; a request alone pays for the way between two threads.

    python tests/benchmarks/bench_hf_engine.py [--hidden 512] [--layers 6] [--tokens 24] [--pairs 3]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from generating import answers, save_model

from swift_dist.serving.hf.generator import Generator
from swift_dist.serving.hf.requests import Sampling
from swift_dist.serving.options import EngineOptions, ServedModel

PROMPT = 32


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """(wall seconds, CPU seconds) of this process, all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def static(model: torch.nn.Module, prompts: list[list[int]], tokens: list[int]) -> None:
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max(tokens))


def continuous(generator: Generator, prompts: list[list[int]], tokens: list[int]) -> None:
    options = [Sampling(temperature=0, max_tokens=number, ignore_eos=True) for number in tokens]
    found = answers(generator, list(zip(prompts, options, strict=True)))
    assert [len(answer.ids) for answer in found] == tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        measure(Path(place) / "model", given)


def measure(folder: Path, given: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {
        "hidden_size": given.hidden,
        "intermediate_size": 2 * given.hidden + 384,
        "num_hidden_layers": given.layers,
    }
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, vocab_size=8192, eos_token_id=None)
    save_model(folder, config)
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = Generator(ServedModel("bench", str(folder), EngineOptions()))
    draws = torch.Generator().manual_seed(0)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters, prompts of {PROMPT} tokens")
    for lengths in ("equal", "mixed"):
        for number in (1, 16, 64):
            if lengths == "mixed" and number == 1:
                continue
            prompts = torch.randint(4, 300, (number, PROMPT), generator=draws).tolist()
            tokens = [given.tokens] * number
            if lengths == "mixed":
                tokens = torch.randint(2, 2 * given.tokens, (number,), generator=draws).tolist()
            static(model, prompts[:1], [2])
            walls, cpus, speed = [], [], []
            for _ in range(given.pairs):
                theirs = timed(lambda: static(model, prompts, tokens))  # noqa: B023
                ours = timed(lambda: continuous(generator, prompts, tokens))  # noqa: B023
                walls.append(theirs[0] / ours[0])
                cpus.append(theirs[1] / ours[1])
                speed.append(sum(tokens) / ours[0])
            print(
                f"{lengths} answers, {number:2} at once: {statistics.median(speed):7.1f} tokens/s, "
                f"{statistics.median(walls):.2f} x generate ({statistics.median(cpus):.2f} by CPU seconds)",
                flush=True,
            )
    generator.close()


if __name__ == "__main__":
    main()
