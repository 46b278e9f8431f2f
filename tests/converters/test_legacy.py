"""Megatron-LM's legacy checkpoints against files made by hand (legacy_files.py)."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from swift_dist.converters.legacy_arguments import config_of_arguments
from swift_dist.converters.legacy_io import LegacyCheckpoint, LegacySide, check_legacy
from swift_dist.converters.legacy_layout import LegacyTarget, lay_out_legacy
from swift_dist.converters.legacy_side import Grid
from swift_dist.converters.mapping import expand, hf_shapes
from swift_dist.converters.plan import HFSide, repeated_names
from swift_dist.converters.reading import Reader
from swift_dist.converters.safetensors_io import HFFolder, TensorSpec, lay_out
from swift_dist.errors import JobError
from swift_dist.models import find_family
from tests.converters import legacy_cases as cases

files, model = cases.files, cases.model
CUTS, Cut, fill, opened = cases.CUTS, cases.Cut, cases.fill, cases.opened


@pytest.fixture(params=CUTS)
def written(request: pytest.FixtureRequest, model: Callable[[str], Any], tmp_path: Path) -> Any:
    """.model, .cut and .folder of a checkpoint made by hand."""
    name, cut = CUTS[request.param]
    found = model(name)
    return SimpleNamespace(model=found, cut=cut, folder=files.write(tmp_path / "made", found.hf, found.tensors, cut))


def layout_of(found: Any, cut: Any, **changes: Any) -> LegacyTarget:
    args = {"make_vocab_size_divisible_by": files.DIVISIBLE_BY, "moe_grouped_gemm": cut.grouped, "data_path": ["a"]}
    if cut.pp == 2 and len(set(cut.stages)) > 1:
        args["decoder_first_pipeline_num_layers"] = cut.stages[0]
    sizes = {"tp": cut.tp, "pp": cut.pp, "ep": cut.ep, "vpp": cut.vpp, "etp": cut.etp, "iteration": 100, **changes}
    dtypes = {tensor.name: "F32" for tensor in expand(found.rows)}
    return lay_out_legacy(found.rows, found.shape, dtypes, args=args, **sizes)


def load(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(path, weights_only=True)


def assert_as_by_hand(folder: Path, found: Any, cut: Any) -> None:
    """Every file, key by key; no other files."""
    names = set()
    for tp, pp, ep in cut.ranks():
        names.add(f"{cut.folder(tp, pp, ep)}/model_optim_rng.pt")
        content = load(folder / cut.folder(tp, pp, ep) / "model_optim_rng.pt")
        assert content["checkpoint_version"] == 3.0 and content["iteration"] == 100
        stated, wanted = vars(content["args"]), vars(files.arguments(found.hf, cut))
        for name in (
            *(f"{kind}_model_parallel_size" for kind in ("tensor", "pipeline", "expert")),
            "padded_vocab_size",
        ):
            assert stated[name] == wanted[name], name
        for virtual, state in enumerate(files.model_states(found.hf, found.tensors, cut, tp, pp, ep)):
            values = content["model" if cut.vpp == 1 else f"model{virtual}"]
            assert values.keys() == state.keys()
            for key, value in state.items():
                assert torch.equal(values[key], value), (tp, pp, ep, key)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.pt")} == names


def test_reading(written: Any, tmp_path: Path) -> None:
    """Every layout gives the tensors of the Hugging Face folder that it was cut out of; copies are found, and equal."""
    found, cut = written.model, written.cut
    checkpoint = LegacyCheckpoint(written.folder.parent)  # by Megatron-LM's tracker
    assert checkpoint.folder == written.folder and checkpoint.iteration == 100
    assert (checkpoint.tp, checkpoint.pp, checkpoint.ep, checkpoint.vpp) == (cut.tp, cut.pp, cut.ep, cut.vpp)
    assert checkpoint.etp == cut.expert_tp and checkpoint.layers() == list(cut.stages)
    assert checkpoint.args["data_path"] == ["a", "b"] and "params_dtype" not in checkpoint.args
    side = opened(written.folder, found)
    ignored = check_legacy(side, found.rows)
    assert {"optimizer", "rng_state", "decoder.layers.0.self_attention.linear_qkv._extra_state"} <= set(ignored)

    shapes = hf_shapes(found.rows)
    layout = lay_out({"model.safetensors": [TensorSpec(name, shape, "F32") for name, shape in shapes.items()]})
    fill(found.rows, side, layout, HFSide(layout.tensors, repeated_names(found.rows, shapes)), tmp_path / "hf")
    values = load_file(tmp_path / "hf" / "model.safetensors")
    assert values.keys() == shapes.keys()
    assert all(torch.equal(value, found.tensors[name]) for name, value in values.items())

    reader, pairs = Reader(), side.replicas(found.rows)
    read = {hold.name for tensor in expand(found.rows) if not tensor.tied_copy for hold in side.hold(tensor)}
    assert read.isdisjoint(other.name for _, other in pairs)
    assert read | {other.name for _, other in pairs} == side.tensors.keys()
    assert all((reader.read(one) == reader.read(other)).all() for one, other in pairs)


def test_writing_from_a_folder(written: Any, tmp_path: Path) -> None:
    found, cut = written.model, written.cut
    if cut.local:
        pytest.skip("written are Transformer Engine's names only")
    target = layout_of(found, cut)
    fill(found.rows, HFSide(HFFolder(found.folder).tensors), target.layout, target.side, tmp_path / "new")
    assert_as_by_hand(tmp_path / "new" / "iter_0000100", found, cut)
    assert target.other_files == {"latest_checkpointed_iteration.txt": "100"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("tp2 pp2", "vpp2"),
        ("vpp2", "uneven pp2"),
        ("norms without TE", "tp2 pp2"),
        ("tied", "tied tp2 pp2"),
        ("tied vpp2", "tied"),
        ("tp2 ep2", "pp2 ep2"),
        ("tp2 ep2 etp1", "grouped tp2 pp2 ep2"),
        ("grouped tp2 pp2 ep2", "tp2 ep4 etp1"),
    ],
)
def test_from_layout_to_layout(before: str, after: str, model: Callable[[str], Any], tmp_path: Path) -> None:
    (name, cut), (_, wanted) = CUTS[before], CUTS[after]
    found = model(name)
    side = opened(files.write(tmp_path / "made", found.hf, found.tensors, cut), found)
    target = layout_of(found, wanted)
    fill(found.rows, side, target.layout, target.side, tmp_path / "new")
    assert_as_by_hand(tmp_path / "new" / "iter_0000100", found, wanted)


@pytest.mark.parametrize("cut", [Cut(tp=2), Cut(pp=2, stages=(2, 2)), Cut(ep=2)], ids=["tp2", "pp2", "ep2"])
def test_without_arguments_the_folders_say_the_layout(cut: Any, model: Callable[[str], Any], tmp_path: Path) -> None:
    """A second number in a folder's name is a pipeline rank or an expert rank."""
    found = model("qwen3_moe")
    checkpoint = LegacyCheckpoint(files.write(tmp_path, found.hf, found.tensors, cut, with_args=False))
    assert checkpoint.args == {}
    assert (checkpoint.tp, checkpoint.pp, checkpoint.ep) == (cut.tp, cut.pp, cut.ep)


def test_release(model: Callable[[str], Any], tmp_path: Path) -> None:
    found = model("llama")
    target = layout_of(found, Cut(), iteration=None)
    fill(found.rows, HFSide(HFFolder(found.folder).tensors), target.layout, target.side, tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(target.other_files["latest_checkpointed_iteration.txt"])
    assert LegacyCheckpoint(tmp_path).folder == tmp_path / "release"


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3_mtp", "mixtral", "llama_biased", "qwen2"])
def test_every_family_comes_back(name: str, save_model: Callable[[str], Any], tmp_path: Path) -> None:
    """There and back through a split layout; with prediction layers the last stage has its own embedding."""
    found = save_model(name)
    shape = found.family.shape(found.hf)
    cut = Cut(tp=2, pp=2, ep=2 if shape.is_moe else 1, stages=(1, 2))
    target = layout_of(SimpleNamespace(rows=found.rows, shape=shape), cut)
    fill(found.rows, HFSide(HFFolder(found.folder).tensors), target.layout, target.side, tmp_path / "new")
    side = opened(tmp_path / "new" / "iter_0000100", SimpleNamespace(rows=found.rows, shape=shape))
    last = "mp_rank_00_001_000" if shape.is_moe else "mp_rank_00_001"
    assert (f"{last}/embedding.word_embeddings.weight" in side.tensors) == name.endswith("_mtp")
    assert (f"{last}/output_layer.weight" in side.tensors) is True
    reader = Reader()
    assert all((reader.read(one) == reader.read(other)).all() for one, other in side.replicas(found.rows))
    shapes = hf_shapes(found.rows)
    layout = lay_out({"model.safetensors": [TensorSpec(key, extent, "F32") for key, extent in shapes.items()]})
    fill(found.rows, side, layout, HFSide(layout.tensors, repeated_names(found.rows, shapes)), tmp_path / "hf")
    values = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(values[key], found.tensors[key].float()) for key in shapes)


def test_unequal_copies_are_found(model: Callable[[str], Any], tmp_path: Path) -> None:
    found = model("qwen3_moe")
    folder = files.write(tmp_path, found.hf, found.tensors, Cut(tp=2, ep=2))
    path = folder / "mp_rank_01_001" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["model"]["decoder.layers.2.mlp.router.weight"][1, 1] += 1
    torch.save(content, path)
    reader, side = Reader(), opened(folder, found)
    unequal = [other.name for one, other in side.replicas(found.rows) if (reader.read(one) != reader.read(other)).any()]
    assert unequal == ["mp_rank_01_001/decoder.layers.2.mlp.router.weight"]


@pytest.mark.parametrize(
    ("name", "changes", "key"),
    [
        ("llama", {"tp": 3}, "tp"),
        ("llama", {"tp": 0}, "tp"),
        ("llama", {"pp": 3}, "pp"),
        ("llama", {"ep": 2}, "ep"),
        ("llama", {"vpp": 2}, "vpp"),
        ("llama", {"pp": 2, "vpp": 3}, "vpp"),
        ("llama", {"etp": 1, "tp": 2}, "etp"),
        ("qwen3_moe", {"ep": 3}, "ep"),
        ("qwen3_moe", {"tp": 1, "etp": 2}, "etp"),
    ],
)
def test_impossible_layouts_are_refused(
    name: str, changes: dict[str, int], key: str, model: Callable[[str], Any]
) -> None:
    with pytest.raises(JobError) as caught:
        layout_of(model(name), Cut(), **changes)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("tp", "ep", "etp"), [(2, 2, 2), (2, 2, 1), (2, 4, 1), (4, 2, 2), (4, 2, 1), (1, 4, 1), (2, 1, 1)]
)
def test_ranks_are_megatrons(tp: int, ep: int, etp: int) -> None:
    """The files that exist, and which part of which experts each holds, by megatron-core's own groups of 16 ranks."""
    from megatron.core.parallel_state import RankGenerator

    order, world = "tp-cp-ep-dp-pp", 16
    dense = RankGenerator(tp=tp, ep=1, dp=world // tp // 2, pp=2, cp=1, order=order)
    expert = RankGenerator(tp=etp, ep=ep, dp=world // etp // ep // 2, pp=2, cp=1, order=order)

    def numbers(generator: Any, kind: str) -> dict[int, int]:
        return {rank: number for group in generator.get_ranks(kind) for number, rank in enumerate(group)}

    pps, tps, eps, etps = numbers(dense, "pp"), numbers(dense, "tp"), numbers(expert, "ep"), numbers(expert, "tp")
    grid = Grid(tp=tp, pp=2, ep=ep, etp=etp)
    there = {(pps[rank], tps[rank], eps[rank], etps[rank]) for rank in range(world)}
    assert there == {(rank.pp, rank.tp, rank.ep, rank.tp % etp) for rank in grid.ranks()}


def test_expert_ranks_without_files() -> None:
    """TP 2, EP 2, ETP 1 are two files, as parallel_state numbers the ranks."""
    grid = Grid(tp=2, ep=2, etp=1)
    assert [grid.folder(rank) for rank in grid.ranks()] == ["mp_rank_00_000", "mp_rank_01_001"]


@pytest.mark.parametrize("name", cases.MODELS)
def test_config_from_a_checkpoints_arguments(name: str, model: Callable[[str], Any], tmp_path: Path) -> None:
    """The same model but for the vocabulary, of which Megatron-LM's arguments know the padded size only."""
    found = model(name)
    checkpoint = LegacyCheckpoint(files.write(tmp_path, found.hf, found.tensors, Cut()))
    config = config_of_arguments(checkpoint.args)
    assert config is not None and config["vocab_size"] == 64
    family = find_family(config)
    assert family.name == found.family.name
    assert family.rows({**config, "vocab_size": 61}) == found.rows
    assert family.transformer_config(config) == found.family.transformer_config(found.hf)
    side = LegacySide(checkpoint, 4, found.shape.num_experts or 0)
    check_legacy(side, family.rows(config))
