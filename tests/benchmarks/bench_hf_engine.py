"""Tokens a second of the hf engine's generator against transformers' own `generate` with a static batch.

The same model in the same process, fp32, greedy, at 1, 16 and 64 concurrent requests: once with prompts and answers of
one length, where a static batch wastes nothing, once with answers of different lengths, where it computes until the
longest is done (only tokens that were asked for count). Runs alternate; each pair gives one ratio; printed is the
median, of wall clock and of CPU seconds (on a machine with other work the steadier one). To be at least 0.9 at 16 and
64 with equal lengths, and more than 1 with different ones; a request alone pays for the way between two threads.

Then the prefix cache: the time to the first token of a conversation's second turn (--turn tokens, an answer, 30 tokens)
against that of a prompt as long that begins with another token, so that all of it is computed. To be at most 0.25.

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
    parser.add_argument("--turn", type=int, default=1000)
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
            tokens = [given.tokens] * number
            if lengths == "mixed":
                tokens = torch.randint(2, 2 * given.tokens, (number,), generator=draws).tolist()
            static(model, [[5] * PROMPT], [2])
            walls, cpus, speed = [], [], []
            for _ in range(given.pairs):
                prompts = torch.randint(4, 300, (number, PROMPT), generator=draws).tolist()  # none is known already
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
    second_turn(generator, given, draws)
    generator.close()


def second_turn(generator: Generator, given: argparse.Namespace, draws: torch.Generator) -> None:
    first = Sampling(temperature=0, max_tokens=1)
    walls, cpus, known, whole = [], [], [], []
    for _ in range(given.pairs):
        turn, more = (torch.randint(5, 300, (number,), generator=draws).tolist() for number in (given.turn, 30))
        (answer,) = answers(generator, [(turn, Sampling(temperature=0, max_tokens=given.tokens, ignore_eos=True))])
        conversation = turn + answer.ids + more
        other = [4, *conversation[1:]]
        without = timed(lambda: answers(generator, [(other, first)]))  # noqa: B023
        again = timed(lambda: answers(generator, [(conversation, first)]))  # noqa: B023
        walls.append(again[0] / without[0])
        cpus.append(again[1] / without[1])
        known.append(again[0])
        whole.append(without[0])
    print(
        f"second turn after {given.turn} tokens: {statistics.median(known) * 1e3:.0f} ms to the first token, "
        f"{statistics.median(whole) * 1e3:.0f} ms without what the first one computed: "
        f"{statistics.median(walls):.2f} ({statistics.median(cpus):.2f} by CPU seconds)"
    )


if __name__ == "__main__":
    main()
