"""LISA, GaLore and NEFTune: how the whole model learns."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import galore_torch
import pytest
import torch

from swift_dist.errors import JobError
from swift_dist.tuners import lisa, neftune
from swift_dist.tuners._projected import ProjectedOptimizer
from swift_dist.tuners.galore import Options
from tests.tuners.tiny import batch, learning, load, stack_of, train


def active_of(model: Any) -> set[int]:
    return {int(name.split(".")[2]) for name in learning(model) if ".layers." in name}


def test_lisa_moves_its_layers_and_trains_no_others(bases):
    stack = stack_of("lisa", lisa={"active_layers": 2, "interval": 3})
    model = stack.apply(load(bases["llama"]), seed=5)
    assert active_of(model) == {0, 1, 2, 3}, "optimizers are made for all"
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    seen = []
    for step in range(12):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        stack.before_step(model, step, 12)
        active = active_of(model)
        model(input_ids=batch()).logits.log_softmax(-1)[..., 1].mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        outside = {n for n in before if ".layers." not in n}
        assert outside <= moved and moved == learning(model), "neither momentum nor decay moves a frozen layer"
        assert active == lisa.active_layers(5, step, 4, lisa.Options(active_layers=2, interval=3))
        seen.append(active)
    assert all(len(active) == 2 for active in seen)
    assert all(seen[step] == seen[step - step % 3] for step in range(12))
    assert len({frozenset(active) for active in seen}) > 1


def test_lisas_choice_is_the_same_in_every_process():
    """Hashes of strings differ from process to process; the choice must not."""
    code = (
        "from swift_dist.tuners.lisa import *\n"
        "print([sorted(active_layers(3, s, 8, Options(interval=2))) for s in range(6)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = [sorted(lisa.active_layers(3, s, 8, lisa.Options(interval=2))) for s in range(6)]
    assert done.stdout.strip() == str(ours)
    assert ours != [sorted(lisa.active_layers(4, s, 8, lisa.Options(interval=2))) for s in range(6)]


def weights(*shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def give_gradients(parameters: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), eps=1e-8)


def test_galore_is_the_projected_adamw_of_the_paper():
    """One tall matrix by hand, in float64: SVD, projection, AdamW's formulas, back; with decay of the matrix itself."""
    (weight,) = weights((6, 4))
    by_hand = weight.detach().double()
    options = Options(rank=2, interval=2, scale=0.5)
    group = {"params": [weight], "names": ["layers.0.mlp.up"], "weight_decay": 0.1}
    optimizer = ProjectedOptimizer([group], adamw, options)
    m = v = torch.zeros(6, 2, dtype=torch.float64)
    for step in range(3):
        give_gradients([weight], step)
        gradient = weight.grad.double()
        if step % 2 == 0:
            p = torch.linalg.svd(gradient, full_matrices=False)[2][:2].T  # [4, 2]
        r = gradient @ p
        m, v = 0.9 * m + 0.1 * r, 0.99 * v + 0.01 * r * r
        update = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
        by_hand = by_hand * (1 - 0.01 * 0.1) - 0.5 * 0.01 * update @ p.T
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), by_hand, rtol=0, atol=1e-6)
    assert optimizer.state[weight]["exp_avg"].shape == (6, 2)
    assert optimizer.state[weight]["projection"].shape == (4, 2)


@pytest.mark.parametrize(
    ("side", "theirs"), [("short", "std"), ("long", "reverse_std"), ("left", "left"), ("right", "right")]
)
def test_galore_equals_its_authors_optimizer(side, theirs):
    """Matrices of either shape, and a vector that is not projected; without decay, which they apply afterwards."""
    ours, reference = weights((6, 4), (4, 6), (5,)), weights((6, 4), (4, 6), (5,))
    names = ["layers.0.self_attn.q_proj", "layers.0.mlp.up", "norm.weight"]
    group = {"params": ours, "names": names, "weight_decay": 0.0}
    optimizer = ProjectedOptimizer([group], adamw, Options(rank=2, interval=2, scale=0.25, side=side))
    projected = {"params": reference[:2], "rank": 2, "update_proj_gap": 2, "scale": 0.25, "proj_type": theirs}
    rest = {"params": reference[2:]}
    reference_optimizer = galore_torch.GaLoreAdamW(
        [projected, rest], lr=0.01, betas=(0.9, 0.99), eps=1e-8, no_deprecation_warning=True
    )
    for step in range(5):
        for group in [*optimizer.param_groups, *reference_optimizer.param_groups]:
            group["lr"] = 0.01 / (step + 1)  # a schedule
        give_gradients(ours, step)
        give_gradients(reference, step)
        optimizer.step()
        reference_optimizer.step()
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_galore_goes_on_from_its_state():
    """Through state_dict, and through a plain copy of ``state``, as strategies save it."""
    results = []
    for how in ("whole", "state_dict", "state"):
        parameters = weights((6, 4), (5,))

        def make(parameters: Any = parameters) -> ProjectedOptimizer:
            group = {"params": parameters, "names": ["mlp.up", "norm"], "weight_decay": 0.1}
            return ProjectedOptimizer([group], adamw, Options(rank=2, interval=3))

        optimizer = make()
        for step in range(6):
            if step == 4 and how != "whole":
                old, optimizer = optimizer, make()
                if how == "state_dict":
                    optimizer.load_state_dict(old.state_dict())
                else:
                    for parameter in parameters:
                        copied = {k: torch.as_tensor(v).clone() for k, v in old.state[parameter].items()}
                        optimizer.state[parameter] = copied
            give_gradients(parameters, step)
            optimizer.step()
        results.append([p.detach() for p in parameters])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_galore_passes_by_what_has_no_gradient_and_refuses_to_do_nothing():
    parameters = weights((6, 4), (6, 4))
    group = {"params": parameters, "names": ["mlp.a", "mlp.b"], "weight_decay": 0.1}
    optimizer = ProjectedOptimizer([group], adamw, Options(rank=2))
    give_gradients(parameters, 0)
    parameters[1].grad = None
    before = parameters[1].detach().clone()
    optimizer.step()
    assert torch.equal(parameters[1], before) and parameters[1] not in optimizer.state
    with pytest.raises(JobError, match="no matrix matches"):
        ProjectedOptimizer([dict(group)], adamw, Options(rank=4))


def test_galore_projects_the_matrices_of_layers_only(bases):
    stack = stack_of("galore", galore={"rank": 4})
    model = stack.apply(load(bases["llama"]), seed=0)
    optimizer = train(model, stack)
    named = {parameter: name for name, parameter in model.named_parameters()}
    projected = {named[p] for p, state in optimizer.state.items() if "projection" in state}
    assert projected == {n for n in named.values() if ".layers." in n and "norm" not in n}


def embedded(model: Any, **arguments: Any) -> torch.Tensor:
    """What the embedding gives in a forward pass."""
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    model(input_ids=batch(2, 32), **arguments)
    hook.remove()
    return seen[0]


def test_neftune_adds_noise_of_the_papers_size_in_training_only(bases):
    model = stack_of("neftune", neftune={"alpha": 8.0}).apply(load(bases["llama"]), seed=0)
    clean = model.get_input_embeddings().weight[batch(2, 32)].detach()
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        noise = embedded(model) - clean
        again = embedded(model) - clean
    bound = 8.0 / (32 * 16) ** 0.5
    assert noise.abs().max() <= bound * 1.0001
    assert noise.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), "uniform"
    assert not torch.equal(noise, again)
    model.eval()
    assert torch.equal(embedded(model), clean)


def test_neftunes_length_is_that_of_a_sequence(bases):
    """A row of two sequences and padding has the noise of each as if it stood alone."""
    model = stack_of("neftune", neftune={"alpha": 8.0}).apply(load(bases["llama"]), seed=0)
    clean = model.get_input_embeddings().weight[batch(2, 32)].detach()
    model.train()
    positions = torch.tensor([[*range(4), *range(28)], [*range(16), *range(16)]])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        noise = (embedded(model, position_ids=positions) - clean).abs()
    for row, part, length in (
        (0, slice(0, 4), 4),
        (0, slice(4, 32), 28),
        (1, slice(0, 16), 16),
        (1, slice(16, 32), 16),
    ):
        bound = 8.0 / (length * 16) ** 0.5
        assert 0.9 * bound < noise[row, part].max() <= 1.0001 * bound

    mask = torch.ones(2, 6)
    mask[0, 4:] = 0  # right padding
    mask[1, :3] = 0  # left padding
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 1, 1, 0, 1, 2]])
    lengths = neftune.sequence_lengths(torch.zeros(2, 6, 16), mask, positions)
    assert lengths[0, :4].tolist() == [4] * 4 and lengths[1, 3:].tolist() == [3] * 3
    assert neftune.sequence_lengths(torch.zeros(2, 6, 16), None, None).tolist() == [[6] * 6] * 2


def test_neftune_beside_lora_finds_the_embedding(bases):
    model = stack_of("lora,neftune", neftune={"alpha": 8.0}).apply(load(bases["llama"]), seed=0)
    model.train()
    clean = model.get_input_embeddings().weight[batch(2, 32)].detach()
    with torch.random.fork_rng(devices=[]):
        assert (embedded(model) - clean).abs().max() > 0
