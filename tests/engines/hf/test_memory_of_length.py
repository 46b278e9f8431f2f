"""What long rows need less memory with: MLPs in tiles, and what recomputed layers keep in the host's memory."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import memory_ranks
import pytest
import ranks
import torch
from sft_runs import LORA, Runs, curve

from swift_dist.config import JobConfig
from swift_dist.engines.hf import offload, tiled_mlp
from swift_dist.errors import JobError, RunError

RANKS = Path(memory_ranks.__file__)
FSDP2, ZERO3 = {"strategy": {"fsdp": "fsdp2"}}, {"strategy": {"deepspeed": "zero3"}}
ALL = {"train": {"recompute": "full", "offload_activations": True, "tiled_mlp": True}}
SHARED = {"parallel": {"context_parallel_size": 2}}


@pytest.fixture(scope="module")
def runs(gang: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(gang, tmp_path_factory.mktemp("runs"))


TILED, OFFLOADED, BOTH = (
    {"tiled": tiled, "recompute": offloaded, "offloaded": offloaded}
    for tiled, offloaded in ((True, False), (False, True), (True, True))
)
STEPS = [  # what learns, strategy, features
    ("all", "ddp", BOTH),
    *(("all", strategy, features) for strategy in ("fsdp2", "zero3") for features in (TILED, BOTH)),
    *(("lora", strategy, features) for strategy, features in (("ddp", OFFLOADED), ("fsdp2", BOTH), ("zero3", TILED))),
    ("mlp", "zero3", TILED),
]


def test_strategies(deepspeed_gang: Any) -> None:
    """Rank 0 has no tiles and rank 1 three: nobody waits for anybody, and each step is that of one process."""
    cases = [{"learns": learns, "strategy": strategy, **features} for learns, strategy, features in STEPS]
    alone = {learns: memory_ranks.alone(learns) for learns in ("all", "lora", "mlp")}
    found = deepspeed_gang.run(RANKS, "train", 2, cases=cases)
    for rank, results in enumerate(found):
        for case, result in zip(cases, results, strict=True):
            wanted = alone[case["learns"]]
            assert wanted[0] != wanted[-1]
            for got, right in zip(result["numbers"], wanted, strict=True):
                assert got == pytest.approx(right, rel=1e-5), case
            # tiles x micro-batches x steps x layers
            assert result["tiles"] == case["tiled"] * rank * 3 * 2 * memory_ranks.STEPS * 2, case
            assert (result["moved"] > 0) == case["offloaded"]


CASES = {
    "shared fsdp2": (2, {}, {**SHARED, **FSDP2, **ALL}),
    "shared lora zero3": (2, {"tuner": LORA}, {**SHARED, **ZERO3, **ALL}),
}


@pytest.mark.parametrize("case", CASES)
def test_runs(runs: Runs, case: str) -> None:
    """Whole runs, whose ranks share rows."""
    world, tuner, changes = CASES[case]
    wanted = curve(runs.run(runs.job(**tuner), 1)[0])
    found = curve(runs.run(runs.job(**tuner, **changes), world)[0])
    assert len(found) == 5 and wanted[-1] != wanted[0]
    for got, right in zip(found, wanted, strict=True):
        assert got == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize(
    "changes, key, words",
    [
        ({"train": {"offload_activations": True}}, "train.offload_activations", "train.recompute: full"),
        ({"train": {"tiled_mlp": True, "compile": True}}, "train.tiled_mlp", "leave out"),
    ],
)
def test_refused(runs: Runs, changes: dict[str, Any], key: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        runs.resolved(runs.job(**changes), 2, tmp_path)
    assert caught.value.key == key and words in str(caught.value)


def wants_tiles(**changes: Any) -> JobConfig:
    return JobConfig.model_validate({"task": "sft", "model": {"path": "/models/tiny"}, **changes})


def is_tiled(model: torch.nn.Module) -> list[bool]:
    return [isinstance(layer.mlp.__dict__.get("forward"), tiled_mlp.TiledMLP) for layer in model.model.layers]


def test_by_default_where_rows_are_shared_and_layers_recomputed() -> None:
    shared, recomputed = {"parallel": {"context_parallel_size": 2}}, {"train": {"recompute": "full"}}
    for changes, wanted in (({}, False), (shared, False), (recomputed, False), ({**shared, **recomputed}, True)):
        model = ranks.tiny()
        tiled_mlp.tile(model, wants_tiles(**changes))
        assert is_tiled(model) == [wanted, wanted]


def test_experts_stay_whole() -> None:
    settings = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]}
    mixed = ranks.tiny("qwen3_moe", head_dim=8, **settings)
    tiled_mlp.tile(mixed, wants_tiles(train={"tiled_mlp": True}))
    assert is_tiled(mixed) == [True, False]
    experts = ranks.tiny("qwen3_moe", head_dim=8, **{**settings, "mlp_only_layers": []})
    with pytest.raises(JobError, match=r"train\.tiled_mlp"):
        tiled_mlp.tile(experts, wants_tiles(train={"tiled_mlp": True}))


def rows(tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()


def gradients(out: torch.Tensor, *of: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out.dtype)
    return list(torch.autograd.grad((out * weights).sum(), of))


def test_dropout_draws_the_same_in_the_backward_pass() -> None:
    """As autograd of the same tiles one after the other, from the same seed."""
    mlp = ranks.tiny().model.layers[0].mlp
    mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.5))
    whole, tiled, x = mlp.forward, tiled_mlp.TiledMLP(mlp, 32), rows(80)
    torch.manual_seed(9)
    wanted = torch.cat([whole(part) for part in x.split(32, dim=1)], dim=1)
    torch.manual_seed(9)
    got = tiled(x)
    torch.rand(7)  # the generator has moved on by then
    assert torch.equal(got, wanted)
    for one, other in zip(gradients(got, x, *mlp.parameters()), gradients(wanted, x, *mlp.parameters()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_half_precision_sums_are_not_rounded_tile_by_tile() -> None:
    """Error of weights' gradients in bfloat16, against float64: that of 128 tiles is at most that of the whole."""
    exact = ranks.tiny().model.layers[0].mlp.double()
    half = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict({name: weight.double() for name, weight in half.state_dict().items()})
    x = rows(4096, torch.bfloat16)
    wanted = gradients(exact(x.detach().double().requires_grad_()), *exact.parameters())
    found = [gradients(forward(x), *half.parameters()) for forward in (half.forward, tiled_mlp.TiledMLP(half, 32))]
    errors = [max(((g.double() - w).norm() / w.norm()).item() for g, w in zip(f, wanted, strict=True)) for f in found]
    assert 0 < errors[1] < 1.1 * errors[0]


def test_under_autocast() -> None:
    mlp = ranks.tiny().model.layers[0].mlp
    whole, tiled, x = mlp.forward, tiled_mlp.TiledMLP(mlp, 32), rows(80)
    with torch.autocast("cpu", torch.bfloat16):
        outs = whole(x), tiled(x)
    assert outs[1].dtype == torch.bfloat16 and torch.equal(*outs)
    wanted, got = (gradients(out, x, *mlp.parameters()) for out in outs)
    assert got[1].dtype == torch.float32
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).norm() < 0.01 * other.norm()


def test_a_copy_calls_its_own_weights() -> None:
    """LLaMA-Pro's new layers are copies of others."""
    model = ranks.tiny()
    tiled_mlp.install(model)
    mlp = copy.deepcopy(model.model.layers[0].mlp)
    mlp.down_proj.weight.data.zero_()
    assert not mlp(rows(80)).any() and model.model.layers[0].mlp(rows(80)).any()


def test_another_width_is_refused() -> None:
    narrow = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 16))
    with pytest.raises(RunError, match="tiled_mlp"):
        tiled_mlp.TiledMLP(narrow, 8)(rows(80))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_recomputed_mlp_is_computed_twice_in_all(recompute: bool) -> None:
    """Forwards, and tile by tile in the backward pass: not once more when the layer is recomputed."""
    model = ranks.tiny(max_position_embeddings=128).train()
    if recompute:
        model.activation_checkpointing_enable()
    tiled_mlp.install(model)
    computed = []
    activation = model.model.layers[0].mlp.act_fn
    activation.register_forward_hook(lambda _, arguments, __: computed.append(arguments[0].shape[1]))
    logits = model(input_ids=torch.full((1, 80), 5), use_cache=False).logits
    assert computed == [1, 32, 32, 16]
    logits.sum().backward()
    assert computed[4:] == [32, 32, 16]


def offloaded() -> Any:
    model = ranks.tiny().train()
    model.activation_checkpointing_enable()
    offload.install(model, torch.device("cpu"))
    return model


def test_what_is_held_goes_with_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step, and after one that fails on its way forwards or backwards. What is held: the layers' inputs."""
    made: list[weakref.ref[Any]] = []
    shapes: list[torch.Size] = []
    init = offload._Held.__init__

    def noted(held: Any, tensor: torch.Tensor, *others: Any) -> None:
        made.append(weakref.ref(held))
        shapes.append(tensor.shape)
        init(held, tensor, *others)

    monkeypatch.setattr(offload._Held, "__init__", noted)
    model = offloaded()
    tokens = torch.full((1, 40), 5)

    def fails(*_: Any) -> None:
        passes.append(0)
        if len(passes) == failing_pass:
            raise RuntimeError("as if out of memory")

    model.model.layers[0].post_attention_layernorm.register_forward_pre_hook(fails)
    for failing_pass in (0, 1, 2):  # never, in the forward pass, while the layer is recomputed
        made.clear()
        passes: list[int] = []
        with pytest.raises(RuntimeError, match="as if") if failing_pass else contextlib.nullcontext():
            model(input_ids=tokens, use_cache=False).logits.sum().backward()
        gc.collect()
        assert len(made) == 2 - (failing_pass == 1) and all(held() is None for held in made), failing_pass
    assert set(shapes) == {torch.Size([1, 40, 32])}


def test_packed_and_unpacked() -> None:
    """Exactly, strides and all, and from memory of its own; the tensor before sets out when one is asked for."""
    host = offload.HostMemory()
    tensors = [torch.randn(4, 6).T, torch.randn(3, 2, dtype=torch.bfloat16)]
    packed = [host.pack(tensor) for tensor in tensors]
    whole = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    assert packed[0]._back is None
    back = host.unpack(packed[1])
    assert torch.equal(back, whole[1]) and packed[0]._back is not None
    for _ in range(2):  # a second backward pass
        back = host.unpack(packed[0])
        assert torch.equal(back, whole[0]) and back.stride() == whole[0].stride()
    for kept in (torch.arange(3), torch.nn.Parameter(torch.ones(2)), torch.empty(0)):
        assert host.unpack(host.pack(kept)) is kept
