"""Megatron-LM's legacy checkpoints against files made by hand (legacy_files.py)."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from swift_dist.converters.copying import Fill, Unit
from swift_dist.converters.legacy_arguments import arguments_of_model, config_of_arguments
from swift_dist.converters.legacy_io import LegacyCheckpoint, LegacySide, check_legacy
from swift_dist.converters.legacy_layout import LegacyTarget, lay_out_legacy
from swift_dist.converters.legacy_side import Grid
from swift_dist.converters.mapping import expand, hf_shapes
from swift_dist.converters.plan import HFSide, Side, make_plan, repeated_names
from swift_dist.converters.reading import Reader
from swift_dist.converters.safetensors_io import HFFolder, Layout, TensorSpec, lay_out
from swift_dist.errors import JobError
from swift_dist.models import find_family


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"converters_tests_{name}", Path(__file__).parent / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


files = _load("legacy_files")
tiny_models = _load("tiny_models")
Cut = files.Cut

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 8},
    "llama_tied": {"head_dim": 8, "tie_word_embeddings": True},
    "qwen3_moe": {},
}
CUTS: dict[str, tuple[str, Any]] = {
    "one file": ("llama", Cut()),
    "tp2": ("llama", Cut(tp=2)),
    "pp2": ("llama", Cut(pp=2, stages=(2, 2))),
    "tp2 pp2": ("llama", Cut(tp=2, pp=2, stages=(2, 2))),
    "uneven pp2": ("llama", Cut(pp=2, stages=(1, 3))),
    "vpp2": ("llama", Cut(pp=2, vpp=2, stages=(1, 1, 1, 1))),
    "norms without TE": ("llama", Cut(tp=2, local=True)),
    "tied": ("llama_tied", Cut(tp=2)),
    "tied tp2 pp2": ("llama_tied", Cut(tp=2, pp=2, stages=(2, 2))),
    "tied vpp2": ("llama_tied", Cut(pp=2, vpp=2, stages=(1, 1, 1, 1))),
    "ep2": ("qwen3_moe", Cut(ep=2)),
    "tp2 ep2": ("qwen3_moe", Cut(tp=2, ep=2)),
    "tp2 ep2 etp1": ("qwen3_moe", Cut(tp=2, ep=2, etp=1)),
    "tp2 ep4 etp1": ("qwen3_moe", Cut(tp=2, ep=4, etp=1)),
    "tp2 etp1": ("qwen3_moe", Cut(tp=2, etp=1)),
    "pp2 ep2": ("qwen3_moe", Cut(pp=2, ep=2, stages=(2, 2))),
    "grouped tp2 pp2 ep2": ("qwen3_moe", Cut(tp=2, pp=2, ep=2, stages=(2, 2), grouped=True)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A saved tiny model of four layers: .folder, .hf, .family, .rows, .shape, .tensors (by HF name)."""

    @cache
    def make(name: str) -> Any:
        folder = tmp_path_factory.mktemp(name)
        tiny_models.save_tiny_model(name.removesuffix("_tied"), folder, num_hidden_layers=4, **MODELS[name])
        hf = json.loads((folder / "config.json").read_text())
        family, tensors = find_family(hf), load_file(folder / "model.safetensors")
        rows, shape = family.rows(hf), family.shape(hf)
        hf = family.complete(hf)
        return SimpleNamespace(folder=folder, hf=hf, family=family, rows=rows, shape=shape, tensors=tensors)

    return make


@pytest.fixture(params=CUTS)
def written(request: pytest.FixtureRequest, model: Callable[[str], Any], tmp_path: Path) -> Any:
    """.model, .cut and .folder of a checkpoint made by hand."""
    name, cut = CUTS[request.param]
    found = model(name)
    return SimpleNamespace(model=found, cut=cut, folder=files.write(tmp_path / "made", found.hf, found.tensors, cut))


def fill(rows: Any, source: Side, layout: Layout, target: Side, folder: Path) -> None:
    """Carry out a plan in this process."""
    plan = make_plan(rows, source, target)
    for file in layout.files:
        (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
    work = Fill(str(folder), tuple((file.name, file.size) for file in layout.files), create=True).start()
    for number, file in enumerate(layout.files):
        regions = tuple(region for region in plan.regions if region.stored.extents[0].file == file.name)
        work(Unit((number, 0), regions, file.literals))


def opened(folder: Path, found: Any) -> LegacySide:
    side = LegacySide(LegacyCheckpoint(folder), found.shape.num_layers, found.shape.num_experts or 0)
    check_legacy(side, found.rows)
    return side


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


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = torch.load(path, weights_only=False)
    edit(content)
    torch.save(content, path)


class Evil:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"mkdir {self.path}",)


def test_nothing_that_a_file_names_is_run(model: Callable[[str], Any], tmp_path: Path) -> None:
    found = model("llama")
    folder = files.write(tmp_path, found.hf, found.tensors, Cut())
    trap = tmp_path / "trap"
    path = folder / "mp_rank_00" / "model_optim_rng.pt"
    change(path, lambda content: content.update(rerun_state_machine=Evil(trap)))
    opened(folder, found)
    path.write_bytes(pickle.dumps(Evil(trap)))
    with pytest.raises(JobError, match="not a whole file of torch"):
        LegacyCheckpoint(folder)
    torch.save(Evil(trap), path)
    with pytest.raises(JobError, match=r"holds no dict but .*system"):
        LegacyCheckpoint(folder)
    assert not trap.exists()


MODEL_FILE = "model_optim_rng.pt"
DAMAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a rank's folder is gone": (r"mp_rank_01_001/.* is missing", lambda f: shutil.rmtree(f / "mp_rank_01_001")),
    "all of a tensor rank": (
        r"mp_rank_01_000/.* is missing",
        lambda f: [shutil.rmtree(f / f"mp_rank_01_00{rank}") for rank in (0, 1)],
    ),
    "a file is gone": (r"mp_rank_01_000/.* is missing", lambda f: (f / "mp_rank_01_000" / MODEL_FILE).unlink()),
    "a file is cut": (
        r"mp_rank_00_001/.* cannot be read: not a whole file",
        lambda f: os.truncate(f / "mp_rank_00_001" / MODEL_FILE, 30000),
    ),
    "a file is empty": ("cannot be read", lambda f: os.truncate(f / "mp_rank_00_000" / MODEL_FILE, 0)),
    "another layout's file": (
        "mixes files of different layouts",
        lambda f: shutil.copytree(f / "mp_rank_00_000", f / "mp_rank_00"),
    ),
    "one rank too many": (
        "says|say",
        lambda f: shutil.copytree(f / "mp_rank_01_000", f / "mp_rank_02_000"),
    ),
    "another iteration": (
        "mp_rank_01_001 is of iteration 99, others of 100",
        lambda f: change(f / "mp_rank_01_001" / MODEL_FILE, lambda content: content.update(iteration=99)),
    ),
    "no state dict": (
        "holds no model but",
        lambda f: change(f / "mp_rank_00_000" / MODEL_FILE, lambda content: content.pop("model")),
    ),
    "megatron-legacy's model": (
        "language_model.encoder",
        lambda f: change(
            f / "mp_rank_00_000" / MODEL_FILE,
            lambda content: content.update(model={"language_model": {"encoder": {}}}),
        ),
    ),
    "GroupedMLP": (
        r"weight1 is GroupedMLP's",
        lambda f: change(
            f / "mp_rank_00_000" / MODEL_FILE,
            lambda content: content["model"].update({"decoder.layers.0.mlp.experts.weight1": torch.ones(2, 2)}),
        ),
    ),
    "an old order of rows": (
        "checkpoint_version is 1.0",
        lambda f: change(f / "mp_rank_00_000" / MODEL_FILE, lambda content: content.update(checkpoint_version=1.0)),
    ),
    "a shape": (
        r"mp_rank_01_000/decoder.layers.1.mlp.linear_fc2.weight: shape \[3, 3\]",
        lambda f: change(
            f / "mp_rank_01_000" / MODEL_FILE,
            lambda content: content["model"].update({"decoder.layers.1.mlp.linear_fc2.weight": torch.ones(3, 3)}),
        ),
    ),
    "a missing copy": (
        r"missing: mp_rank_01_001/decoder.final_layernorm.weight",
        lambda f: change(
            f / "mp_rank_01_001" / MODEL_FILE, lambda content: content["model"].pop("decoder.final_layernorm.weight")
        ),
    ),
    "an unknown weight": (
        r"mapped by no row: mp_rank_00_001/decoder.layers.0.adapter.weight",
        lambda f: change(
            f / "mp_rank_00_001" / MODEL_FILE,
            lambda content: content["model"].update({"decoder.layers.0.adapter.weight": torch.ones(3, 3)}),
        ),
    ),
    "a layer": (
        "lacks a layer",
        lambda f: change(
            f / "mp_rank_00_001" / MODEL_FILE,
            lambda content: [
                content["model"].pop(key) for key in list(content["model"]) if key.startswith("decoder.layers.0.")
            ],
        ),
    ),
    "a quantised tensor": (
        "is no plain tensor but",
        lambda f: change(
            f / "mp_rank_00_001" / MODEL_FILE,
            lambda content: content["model"].update({"output_layer.weight": Namespace()}),
        ),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_with_a_checkpoint_is_named(damage: str, model: Callable[[str], Any], tmp_path: Path) -> None:
    found = model("llama")
    folder = files.write(tmp_path, found.hf, found.tensors, Cut(tp=2, pp=2, stages=(2, 2)))
    message, spoil = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(JobError, match=message) as caught:
        opened(folder, found)
    assert caught.value.key == "source"


def test_another_model_than_the_config_says(model: Callable[[str], Any], tmp_path: Path) -> None:
    found = model("llama")
    checkpoint = LegacyCheckpoint(files.write(tmp_path, found.hf, found.tensors, Cut(pp=2, stages=(2, 2))))
    with pytest.raises(JobError, match=r"has 4 layers \(2 \+ 2\), its config 5"):
        LegacySide(checkpoint, 5)
    larger = found.family.rows({**found.hf, "vocab_size": 200})
    with pytest.raises(JobError, match=r"embedding\.word_embeddings\.weight has 200 rows"):
        check_legacy(LegacySide(checkpoint, 4), larger)


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


def test_expert_ranks_without_files() -> None:
    """TP 2, EP 2, ETP 1 are two files, as parallel_state numbers the ranks."""
    grid = Grid(tp=2, ep=2, etp=1)
    assert [grid.folder(rank) for rank in grid.ranks()] == ["mp_rank_00_000", "mp_rank_01_001"]


@pytest.mark.parametrize("name", MODELS)
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


@pytest.mark.parametrize("name", ["llama", "llama_biased", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral"])
def test_arguments_and_config_are_each_others_inverse(name: str, save_model: Callable[[str], Any]) -> None:
    found = save_model(name)
    transformer = found.family.transformer_config(found.hf)
    config = config_of_arguments(arguments_of_model(transformer, found.family.gpt_model(found.hf)))
    assert config is not None
    family = find_family(config)
    assert family.name == found.family.name and family.rows(config) == found.rows
    assert family.transformer_config(config) == transformer
    assert family.gpt_model(config) == found.family.gpt_model(found.hf)


def test_llama3_scaling_is_kept(save_model: Callable[[str], Any]) -> None:
    found = save_model("llama")
    rope = {"rope_type": "llama3", "factor": 32.0}
    args = arguments_of_model(found.family.transformer_config(found.hf), found.family.gpt_model(found.hf), rope)
    config = config_of_arguments(args)
    assert config is not None and config["rope_scaling"]["factor"] == 32.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None, "padded_vocab_size": None, "vocab_size": None}, "lack hidden_size, padded_vocab_size"),
        ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm'"),
        ({"normalization": None}, "normalization is None"),
        ({"multi_latent_attention": True}, "multi_latent_attention"),
        ({"moe_shared_expert_intermediate_size": 8}, "moe_shared_expert_intermediate_size"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type"),
        ({"qk_layernorm": True, "add_qkv_bias": True}, "no family here has qk_layernorm and add_qkv_bias"),
    ],
)
def test_arguments_that_do_not_say_enough(
    changes: dict[str, Any], message: str, save_model: Callable[[str], Any]
) -> None:
    found = save_model("llama")
    args = arguments_of_model(found.family.transformer_config(found.hf), found.family.gpt_model(found.hf))
    with pytest.raises(JobError, match=message) as caught:
        config_of_arguments({**args, **changes})
    assert caught.value.key == "hf_config"
    assert config_of_arguments({}) is None
