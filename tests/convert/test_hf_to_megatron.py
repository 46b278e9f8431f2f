"""`convert hf-to-megatron`: sources of every kind, dtypes, key styles, what travels with the weights, and over Ray."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from swift_dist.convert import hf_to_megatron, megatron_to_hf
from swift_dist.converters.dist_index import dist_index
from swift_dist.converters.mapping import checkpoint_key, duplicates, expand, slices
from swift_dist.converters.reading import Reader, as_torch
from swift_dist.kernels import block_fp8
from swift_dist.models import find_family
from tests.convert.commands import contents, result_of
from tests.converters import tiny_models

Tensors = dict[str, torch.Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BLOCK = 16


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A saved tiny model by name: .folder, .tensors, .rows; saved once."""

    @cache
    def save(name: str) -> Any:
        folder = tmp_path_factory.mktemp(name)
        tiny_models.save_tiny_model(name, folder)
        config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        family = find_family(config)
        rows = family.rows(family.for_folder(config, tensors.keys()))
        return SimpleNamespace(folder=folder, tensors=tensors, rows=rows, config=config)

    return save


def to_megatron(source: Path, target: Path, **options: Any) -> dict[str, Any]:
    given = {"source": str(source), "target": str(target), "workers": 1, **options}
    return hf_to_megatron.run(hf_to_megatron.HFToMegatronOptions(**given))


def to_hf(source: Path, target: Path, **options: Any) -> dict[str, Any]:
    given = {"source": str(source), "target": str(target), "workers": 1, **options}
    return megatron_to_hf.run(megatron_to_hf.MegatronToHFOptions(**given))


def stored(folder: Path) -> Tensors:
    """Every tensor of a torch_dist checkpoint, read by torch."""
    tensors = dist_index(folder)
    state = {key: as_torch(Reader().read(found)) for key, found in tensors.items()}
    loaded = {key: torch.empty_like(values) for key, values in state.items()}
    dcp.load(loaded, checkpoint_id=str(folder), no_dist=True)
    assert all(same(loaded[key], values) for key, values in state.items())
    return loaded


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def whole(saved: Any) -> Tensors:
    """The weights as Megatron tensors, by global name."""
    found = {}
    for tensor in expand(saved.rows):
        values = torch.full(tensor.shape, float("nan"))
        for piece in tensor.pieces:
            values[slices(piece.megatron_box)] = saved.tensors[piece.hf][slices(piece.hf_box)]
        if not tensor.tied_copy:
            found[tensor.name] = values
    return found


@pytest.mark.parametrize("sharded", [False, True])
def test_bin_files_give_the_same_checkpoint(model: Callable[[str], Any], tmp_path: Path, sharded: bool) -> None:
    saved = model("qwen3_moe")
    source = tmp_path / "bin"
    source.mkdir()
    shutil.copy(saved.folder / "config.json", source)
    shutil.copy(saved.folder / "generation_config.json", source)
    names = sorted(saved.tensors)
    if sharded:
        files = {f"pytorch_model-0000{k + 1}-of-00003.bin": names[k::3] for k in range(3)}
        index = {name: file for file, inside in files.items() for name in inside}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    else:
        files = {"pytorch_model.bin": names}
    for file, inside in files.items():
        torch.save({name: torch.nn.Parameter(saved.tensors[name]) for name in inside}, source / file)
    to_megatron(source, tmp_path / "from_bin")
    to_megatron(saved.folder, tmp_path / "from_safetensors")
    assert contents(tmp_path / "from_bin") == contents(tmp_path / "from_safetensors")


def test_fp8_blocks_become_bf16(model: Callable[[str], Any], tmp_path: Path) -> None:
    saved = model("deepseek_v3")
    source, expected, tensors = tmp_path / "fp8", {}, {}
    source.mkdir()
    for name, values in saved.tensors.items():
        if values.ndim != 2 or "norm" in name or name in ("model.embed_tokens.weight", "lm_head.weight"):
            expected[name] = tensors[name] = values if name.endswith("_bias") else values.bfloat16()
            continue
        rows, columns = (-(-extent // BLOCK) for extent in values.shape)
        padded = torch.zeros(rows * BLOCK, columns * BLOCK)
        padded[: values.shape[0], : values.shape[1]] = values
        scale = padded.reshape(rows, BLOCK, columns, BLOCK).abs().amax((1, 3)) / 448
        spread = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: values.shape[0], : values.shape[1]]
        quantised = (values / spread).to(torch.float8_e4m3fn)
        tensors |= {name: quantised, f"{name}_scale_inv": scale}
        expected[name] = (quantised.float() * spread).bfloat16()
    assert any(extent % BLOCK for values in tensors.values() if values.ndim == 2 for extent in values.shape)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    (source / "config.json").write_text(json.dumps({**saved.config, "quantization_config": quantisation}))
    result = to_megatron(source, tmp_path / "checkpoint", verify=True)
    assert result["verified"]["equal"]
    to_hf(tmp_path / "checkpoint", tmp_path / "hf")
    got = load_file(tmp_path / "hf" / "model.safetensors")
    assert got.keys() == expected.keys()
    assert all(same(got[name], values) for name, values in expected.items())
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_fp8_with_factors_in_half_precision(
    model: Callable[[str], Any], tmp_path: Path, scale_dtype: torch.dtype
) -> None:
    """Qwen3's files hold them so. The same Megatron weights as of the folder that the kernel's formula dequantises."""
    saved = model("qwen3")
    folders = {kind: tmp_path / kind for kind in ("fp8", "plain")}
    tensors: dict[str, dict[str, torch.Tensor]] = {"fp8": {}, "plain": {}}
    for name, values in saved.tensors.items():
        if "_proj" not in name:
            tensors["fp8"][name] = tensors["plain"][name] = values.bfloat16()
            continue
        quantised, factors = block_fp8.quantise(values, (BLOCK, BLOCK))
        factors = factors.to(scale_dtype)
        tensors["fp8"] |= {name: quantised, f"{name}_scale_inv": factors}
        tensors["plain"][name] = block_fp8.dequantise(quantised, factors, (BLOCK, BLOCK), torch.bfloat16)
    for kind, folder in folders.items():
        folder.mkdir()
        save_file(tensors[kind], folder / "model.safetensors", metadata={"format": "pt"})
        settings = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}}
        (folder / "config.json").write_text(json.dumps({**saved.config, **(settings if kind == "fp8" else {})}))
        to_megatron(folder, tmp_path / f"{kind}_checkpoint")
    quantised_ones = [name for name in tensors["fp8"] if name.endswith("_scale_inv")]
    assert len(quantised_ones) == 7 * saved.config["num_hidden_layers"]
    assert contents(tmp_path / "fp8_checkpoint") == contents(tmp_path / "plain_checkpoint")


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", pytest.param("deepseek_v3_mtp", marks=pytest.mark.table)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(model: Callable[[str], Any], tmp_path: Path, name: str, dtype: Any) -> None:
    saved = model(name)
    result = to_megatron(saved.folder, tmp_path / "checkpoint", dtype=dtype)
    got = stored(tmp_path / "checkpoint")
    assert result["dtype"] == (dtype if name != "deepseek_v3_mtp" else result["dtype"])
    for tensor_name, values in whole(saved).items():
        key, expert = checkpoint_key(tensor_name)
        kept = key.endswith("expert_bias")  # the router computes with it in fp32
        held = got[key] if expert is None else got[key][expert]
        assert same(held, values if kept else values.to(DTYPES[dtype])), tensor_name
    back = to_hf(tmp_path / "checkpoint", tmp_path / "hf", dtype="fp32")
    assert back["dtype"] == "fp32"


def homogeneous(saved: Any) -> Tensors:
    """All layers of a weight in one tensor, and all experts of those."""
    layers: dict[str, dict[tuple[int, ...], torch.Tensor]] = {}
    found: Tensors = {}
    for name, values in whole(saved).items():
        key, expert = checkpoint_key(name)
        words = key.split(".")
        if "layers" not in words:
            found[key] = values
            continue
        layer = int(words.pop(words.index("layers") + 1))
        layers.setdefault(".".join(words), {})[(layer,) if expert is None else (layer, expert)] = values
    for key, parts in layers.items():
        lead = [1 + max(place[k] for place in parts) for k in range(len(next(iter(parts))))]
        assert len(parts) == torch.Size(lead).numel()
        found[key] = torch.stack([parts[place] for place in sorted(parts)])
        found[key] = found[key].reshape(*lead, *found[key].shape[1:])
    return found


def singleton(saved: Any) -> Tensors:
    """Each expert under a key of its own, both halves of a gated projection apart."""
    found: Tensors = {}
    for name, values in whole(saved).items():
        key = name.replace(".local_experts.", ".experts.") if ".experts." in name else checkpoint_key(name)[0]
        if key.endswith("linear_fc1.weight"):
            found |= dict(zip((f"{key}_w", f"{key}_v"), values.chunk(2), strict=True))
        else:
            found[key] = values
    return found


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    ("name", "style"), [("llama", homogeneous), ("mixtral", homogeneous), ("llama", singleton), ("mixtral", singleton)]
)
def test_other_styles_of_keys_are_read(
    model: Callable[[str], Any], tmp_path: Path, name: str, style: Callable[[Any], Tensors], prefix: str
) -> None:
    saved = model(name)
    state = {prefix + key: values.contiguous() for key, values in style(saved).items()}
    state["optimizer.state.exp_avg.decoder.final_layernorm.weight"] = torch.zeros(32)
    dcp.save(state, checkpoint_id=str(tmp_path / "checkpoint"), no_dist=True)
    result = to_hf(tmp_path / "checkpoint", tmp_path / "hf", hf_config=str(saved.folder))
    got = load_file(tmp_path / "hf" / "model.safetensors")
    repeated = {row.hf for row in duplicates(saved.rows)}
    assert result["ignored_tensors"] == 1 and got.keys() >= saved.tensors.keys() - repeated
    assert all(same(values, saved.tensors[key]) for key, values in got.items())


def with_companions(saved: Any, folder: Path) -> dict[str, bytes]:
    """A model folder with all that travels, by name, and some that does not."""
    from tokenizers import Tokenizer, models

    shutil.copytree(saved.folder, folder)
    Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, "a")).save(str(folder / "tokenizer.json"))
    texts = {
        "tokenizer_config.json": json.dumps({"bos_token": "<s>", "eos_token": "</s>"}),
        "special_tokens_map.json": "{}",
        "generation_config.json": '{"temperature":   0.5}',
        "chat_template.jinja": "{{ messages }}\n",
        "merges.txt": "#version: 0.2\n",
        "modeling_own.py": "raise SystemExit('never run')\n",
        "qwen.tiktoken": "YQ== 0\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "README.md").write_text("stays")
    return {name: (folder / name).read_bytes() for name in (*texts, "tokenizer.json")}


def test_what_is_not_weights_comes_back_as_it_was(model: Callable[[str], Any], tmp_path: Path) -> None:
    files = with_companions(model("llama"), tmp_path / "source")
    result = to_megatron(tmp_path / "source", tmp_path / "checkpoint")
    beside = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint" / "hf").iterdir()}
    config = beside.pop("config.json")
    assert beside == files and {f"hf/{name}" for name in (*files, "config.json")} <= set(result["other_files"])
    stated = json.loads((tmp_path / "source" / "config.json").read_text())
    assert json.loads(config) == stated
    to_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert {name: (tmp_path / "back" / name).read_bytes() for name in files} == files
    assert not list((tmp_path / "back").glob("README*")) + list((tmp_path / "checkpoint").rglob("README*"))
    again = json.loads((tmp_path / "back" / "config.json").read_text())
    changed = {key for key in {*again, *stated} if again.get(key) != stated.get(key)}
    assert changed <= {"bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype"}
    assert all(again[key] == stated[key] for key in changed if stated.get(key) is not None and key != "torch_dtype")


def test_a_dry_run_writes_nothing_and_json_is_one_object(model: Callable[[str], Any], tmp_path: Path) -> None:
    saved, target = model("llama"), tmp_path / "checkpoint"
    planned = result_of("hf-to-megatron", saved.folder, target, "--dry_run", "true", "--max_shard_size", "40KB")
    assert planned["dry_run"] and not list(tmp_path.iterdir())
    result = result_of("hf-to-megatron", saved.folder, target, "--max_shard_size", "40KB")
    for key in ("files", "tensors", "parameters", "bytes", "bytes_read", "other_files", "dtype", "largest_tensor"):
        assert result[key] == planned[key], key
    there = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert there == {*result["files"], *result["other_files"], "conversion_report.json", "conversion_report.md"}


def test_files_of_any_size_hold_the_same(model: Callable[[str], Any], tmp_path: Path) -> None:
    saved = model("qwen3_moe")
    found = []
    for size in ("5GB", "100KB", "16KiB", "1"):
        result = to_megatron(saved.folder, tmp_path / size, max_shard_size=size)
        found.append((len(result["files"]), stored(tmp_path / size)))
    counts = [count for count, _ in found]
    assert counts == sorted(set(counts)) and counts[0] == 1
    assert all(same(values, held[key]) for _, held in found for key, values in found[0][1].items())
    chunks = sum(len(each.extents) for each in dist_index(tmp_path / "1").values())
    assert counts[-1] == chunks
    largest = max(path.stat().st_size for path in (tmp_path / "100KB").glob("*.distcp"))
    assert largest <= 100_000


RAY_CASE = """
import json, sys
from ray.cluster_utils import Cluster
from swift_dist.convert import hf_to_megatron as verb
source, target = sys.argv[1:]
nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
nodes.add_node(num_cpus=1)
try:
    given = {"launcher": "ray", "ray_address": nodes.address, "max_shard_size": "100KB"}
    verb.run(verb.HFToMegatronOptions(source=source, target=target, **given))
finally:
    nodes.shutdown()
"""


@pytest.mark.slow
def test_actors_of_a_ray_cluster_write_the_same(model: Callable[[str], Any], tmp_path: Path) -> None:
    """In a process of its own: Ray keeps the settings of a process's earlier clusters for its life."""
    saved = model("qwen3_moe")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", RAY_CASE, saved.folder, tmp_path / "ray"],
        env={**clean, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    to_megatron(saved.folder, tmp_path / "local", max_shard_size="100KB")
    ours, theirs = (json.loads((tmp_path / name / "conversion_report.json").read_text()) for name in ("ray", "local"))
    assert len(ours["files"]) > 2
    for key in ("target_hashes", "source_hashes", "files"):
        assert ours[key] == theirs[key]
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
