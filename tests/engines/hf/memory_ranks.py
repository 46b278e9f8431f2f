"""Ranks of the tests of tiled MLPs and offloaded activations: rows so unequal that one rank has no tiles at all."""

from __future__ import annotations

from typing import Any

import deepspeed_ranks
import ranks
import torch
import torch.distributed as dist

from swift_dist.engines.hf import offload, tiled_mlp

LENGTHS = (20, 90)
"""Tokens of each rank's micro-batches; tiles have 32."""
STEPS = 3


def model(learns: str) -> torch.nn.Module:
    """All of it learns; or "lora" beside its matrices; or the MLP of its first layer alone ("mlp")."""
    made = ranks.tiny(max_position_embeddings=128)
    if learns == "lora":
        from swift_dist.config import TunerSection
        from swift_dist.tuners import find_tuners

        settings = TunerSection(name=["lora"], lora={"rank": 4, "alpha": 8})
        torch.manual_seed(5)
        made = find_tuners(settings).apply(made, seed=5)
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    elif learns == "mlp":
        for name, parameter in made.named_parameters():
            parameter.requires_grad_("layers.0.mlp" in name)
    return made.train()


def batch(number: int, rank: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, weights) [1, T]."""
    generator = torch.Generator().manual_seed(100 * number + 10 * micro + rank)
    tokens = torch.randint(3, ranks.VOCABULARY, (1, LENGTHS[rank]), generator=generator)
    return tokens, torch.rand(tokens.shape, generator=generator)


def alone(learns: str) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the steps in this process, with none of it."""
    module = model(learns)
    optimizer = deepspeed_ranks.adamw(deepspeed_ranks.groups(module))
    numbers = []
    for number in range(STEPS):
        parts = [ranks.loss_sum(module, batch(number, rank, micro), 100.0) for rank in (0, 1) for micro in (0, 1)]
        loss = torch.stack(parts).sum()
        loss.backward()
        learning = [p for p in module.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(learning, deepspeed_ranks.CLIP)
        for group in optimizer.param_groups:
            group["lr"] = deepspeed_ranks.rate(number) * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()
        numbers.append((loss.item(), norm.item()))
    return numbers


def train(worker: Any, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cases one after the other in one process."""
    torch.set_num_threads(1)
    with ranks.joined(worker):
        return [_train(worker.rank, **case) for case in cases]


def _train(rank: int, strategy: str, learns: str, tiled: bool, recompute: bool, offloaded: bool) -> dict[str, Any]:
    made_model: Any = model(learns)
    if recompute:
        (made_model.get_base_model() if learns == "lora" else made_model).activation_checkpointing_enable()
    counts = {"tiles": 0, "moved": 0}
    if tiled:
        assert tiled_mlp.install(made_model) == 2
    if offloaded:
        offload.install(made_model, torch.device("cpu"))
    made = deepspeed_ranks.strategy(made_model, deepspeed_ranks.job(strategy))
    with _counting(counts):
        numbers = [_step(made, rank, number) for number in range(STEPS)]
    made.close()
    return {"numbers": numbers, **counts}


def _step(made: Any, rank: int, number: int) -> tuple[float, float]:
    found = torch.zeros(())
    for micro in (0, 1):
        with made.accumulate(micro == 1):
            loss = ranks.loss_sum(made.module, batch(number, rank, micro), 100.0)
            made.backward(loss)
        found += loss.detach()
    dist.all_reduce(found)
    norm = made.gradient_norm()
    made.update(deepspeed_ranks.rate(number), norm)
    return found.item(), norm


class _counting:
    """How many tiles were differentiated, how many tensors came back from the host."""

    def __init__(self, counts: dict[str, int]) -> None:
        self._counts = counts
        self._originals = tiled_mlp.TiledMLP.gradients, offload._Held.arrived

    def __enter__(self) -> None:
        gradients, arrived = self._originals

        def counted(mlp: Any, rows: torch.Tensor, *others: Any) -> Any:
            self._counts["tiles"] += len(mlp.parts(rows))
            return gradients(mlp, rows, *others)

        def counted_arrived(held: Any) -> torch.Tensor:
            self._counts["moved"] += 1
            return arrived(held)

        tiled_mlp.TiledMLP.gradients, offload._Held.arrived = counted, counted_arrived  # type: ignore[method-assign]

    def __exit__(self, *_: Any) -> None:
        tiled_mlp.TiledMLP.gradients, offload._Held.arrived = self._originals  # type: ignore[method-assign]
