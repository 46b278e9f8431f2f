"""What may be wrong with a Hugging Face folder: edits of whole ones, by name, and the message that each deserves."""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
Edit = Callable[[Path], None]


def shard(folder: Path, number: int = 1) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


def headed(change: Callable[[dict[str, Any]], Any]) -> Edit:
    """Change the header of the second shard: in place, or to what is returned."""

    def edit(folder: Path) -> None:
        content = shard(folder).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        changed = change(header)
        text = changed if isinstance(changed, bytes) else json.dumps(header if changed is None else changed).encode()
        shard(folder).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return edit


def first(header: dict[str, Any]) -> dict[str, Any]:
    """The entry whose bytes come first."""
    return min((v for k, v in header.items() if k != "__metadata__"), key=lambda entry: entry["data_offsets"])


def set_first(key: str, value: Callable[[Any], Any]) -> Edit:
    return headed(lambda header: first(header).update({key: value(first(header)[key])}))


def retensored(change: Callable[[dict[str, torch.Tensor]], None], number: int = 1) -> Edit:
    """Change the tensors of a shard."""

    def edit(folder: Path) -> None:
        tensors = load_file(shard(folder, number))
        change(tensors)
        save_file(tensors, shard(folder, number), metadata={"format": "pt"})

    return edit


def indexed(change: Callable[[dict[str, Any]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def configured(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def cut(name: str, by: int = 1) -> Edit:
    def edit(folder: Path) -> None:
        path = shard(folder) if name == "shard" else folder / name
        os.truncate(path, path.stat().st_size - by)

    return edit


def written(name: str, content: bytes) -> Edit:
    return lambda folder: void((folder / name).write_bytes(content))


def removed(name: str) -> Edit:
    return lambda folder: (shard(folder) if name == "shard" else folder / name).unlink()


def void(_: object) -> None: ...


def first_name(tensors: dict[str, Any]) -> str:
    return next(name for name, values in sorted(tensors.items()) if values.ndim == 2)


def replaced(make: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return retensored(lambda tensors: tensors.update({(name := first_name(tensors)): make(tensors[name])}))


def to_other_file(index: dict[str, Any]) -> None:
    files = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == files[1])
    index["weight_map"][name] = files[0]


def twice(folder: Path) -> None:
    there = load_file(shard(folder, 0))
    name = next(iter(there))
    retensored(lambda tensors: tensors.update({name: there[name]}))(folder)


def extra(folder: Path) -> None:
    retensored(lambda tensors: tensors.update({"model.layers.0.other.weight": torch.ones(3)}))(folder)
    file = shard(folder).name
    indexed(lambda index: index["weight_map"].update({"model.layers.0.other.weight": file}))(folder)


def quantised(scale: Callable[[torch.Tensor], torch.Tensor] | None, **settings: Any) -> Edit:
    """One weight of the model as fp8; with factors that `scale` makes of the weight."""

    def edit(folder: Path) -> None:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            name = first_name(tensors)
            if scale is not None:
                tensors[f"{name}_scale_inv"] = scale(tensors[name])
                file = shard(folder).name
                indexed(lambda index: index["weight_map"].update({f"{name}_scale_inv": file}))(folder)
            tensors[name] = tensors[name].to(settings.get("stored", torch.float8_e4m3fn))

        retensored(change)(folder)
        configured(quantization_config=settings.get("config", {"weight_block_size": [16, 16]}))(folder)

    return edit


def blocks(values: torch.Tensor) -> torch.Tensor:
    return torch.ones(-(-values.shape[0] // 16), -(-values.shape[1] // 16))


WRONG_FOLDERS: dict[str, tuple[str, Edit, str, str]] = {
    # name: (model, what is done to its folder, key, a piece of the message)
    "truncated shard": ("llama", cut("shard"), "source", "the file has"),
    "empty shard": ("llama", lambda folder: os.truncate(shard(folder), 0), "source", "its header would take 0 bytes"),
    "longer shard": ("llama", lambda f: void(shard(f).open("ab").write(b"x")), "source", "the file has"),
    "missing shard": ("llama", removed("shard"), "source", "which is missing"),
    "index of a missing file": (
        *("llama", indexed(lambda index: index["weight_map"].update({"lm_head.weight": "no.safetensors"}))),
        *("source", "names no.safetensors, which is missing"),
    ),
    "index leads out of the folder": (
        *("llama", indexed(lambda index: index["weight_map"].update({"lm_head.weight": "../a.safetensors"}))),
        *("source", "outside the folder"),
    ),
    "index of the wrong file": ("llama", indexed(to_other_file), "source", "which does not hold it"),
    "index of an unknown tensor": (
        *("llama", indexed(lambda index: index["weight_map"].update({"a": next(iter(index["weight_map"].values()))}))),
        *("source", "the index says that a is in"),
    ),
    "index of numbers": (
        *("llama", indexed(lambda index: index["weight_map"].update({"lm_head.weight": 5}))),
        *("source", f"{INDEX} cannot be read"),
    ),
    "index of only numbers": (
        *("llama", indexed(lambda index: index.update(weight_map={"lm_head.weight": 5}))),
        *("source", f"{INDEX} cannot be read"),
    ),
    "index without a map": ("llama", indexed(lambda index: index.pop("weight_map")), "source", f"{INDEX} cannot be"),
    "index is a list": ("llama", written(INDEX, b"[1]"), "source", f"{INDEX} cannot be read"),
    "index is no JSON": ("llama", written(INDEX, b"{"), "source", f"{INDEX} cannot be read"),
    "index is missing": ("llama", removed(INDEX), "source", f"and no {INDEX}"),
    "tensor not in the index": (
        *("llama", indexed(lambda index: index["weight_map"].pop("lm_head.weight"))),
        *("source", "lm_head.weight is in a file but not in the index"),
    ),
    "tensor in two files": ("llama", twice, "source", " is in model-00001-of-"),
    "offsets overlap": ("llama", set_first("data_offsets", lambda at: [at[0], at[1] + 4]), "source", "do not fit"),
    "offsets leave a gap": ("llama", set_first("data_offsets", lambda at: [at[0] + 4, at[1] + 4]), "source", "do not"),
    "offsets beyond the end": ("llama", set_first("data_offsets", lambda at: [1 << 40, 1 << 41]), "source", "do not"),
    "offsets backwards": ("llama", set_first("data_offsets", lambda at: at[::-1]), "source", "do not fit"),
    "offsets negative": ("llama", set_first("data_offsets", lambda at: [-4, at[1] - 4]), "source", "do not fit"),
    "offsets are fractions": (
        "llama",
        set_first("data_offsets", lambda at: [0.0, float(at[1])]),
        "source",
        "not as it",
    ),
    "offsets are infinite": (
        "llama",
        set_first("data_offsets", lambda at: [0, math.inf]),
        "source",
        "not as it should",
    ),
    "three offsets": ("llama", set_first("data_offsets", lambda at: [*at, 5]), "source", "not as it should be"),
    "too long a header": ("llama", headed(lambda header: b" " * 100_000_001), "source", "its header would take"),
    "header beyond the end": (
        *("llama", lambda folder: void(shard(folder).write_bytes(struct.pack("<Q", 1 << 40) + b"{}"))),
        *("source", "its header would take"),
    ),
    "negative shape": (
        "llama",
        set_first("shape", lambda shape: [-extent for extent in shape]),
        "source",
        "do not fit",
    ),
    "infinite shape": ("llama", set_first("shape", lambda shape: [math.inf]), "source", "not as it should be"),
    "shape is text": ("llama", set_first("shape", lambda shape: "32"), "source", "not as it should be"),
    "fewer bytes than the shape": ("llama", set_first("shape", lambda shape: [*shape, 2]), "source", "do not fit"),
    "unknown dtype": ("llama", set_first("dtype", lambda dtype: "F4"), "source", "has dtype F4, which is not known"),
    "header is no JSON": ("llama", headed(lambda header: b"{not JSON"), "source", "no JSON"),
    "header is no text": ("llama", headed(lambda header: b"\xff\xfe{}"), "source", "no JSON"),
    "header nested without end": ("llama", headed(lambda header: b"[" * 1_000_000), "source", "no JSON"),
    "header is a list": ("llama", headed(lambda header: [1]), "source", "no JSON object"),
    "header of lists": ("llama", headed(lambda header: {**header, "a": [1]}), "source", "not as it should be"),
    "wrong shape": ("llama", replaced(lambda values: values[:-1].clone()), "source", "config.json says ["),
    "wrong dtype": ("llama", replaced(lambda values: values.to(torch.int8)), "source", "stored as I8, not as plain"),
    "tensor that nobody maps": ("llama", extra, "source", "unexpected: model.layers.0.other.weight [3]"),
    "fp8 without factors": ("llama", quantised(None), "source", "_scale_inv"),
    "fp8 with factors of another shape": (
        *("llama", quantised(lambda values: blocks(values)[:, :-1].clone())),
        *("source", "need F32, BF16 or F16 ["),
    ),
    "fp8 with factors of another dtype": (
        *("llama", quantised(lambda values: blocks(values).to(torch.int8))),
        *("source", "need F32, BF16 or F16 ["),
    ),
    "fp8 in blocks of no size": (
        *("llama", quantised(blocks, config={"weight_block_size": [0, 0]})),
        *("source", "weight_block_size"),
    ),
    "fp8 in blocks of one number": (
        *("llama", quantised(blocks, config={"weight_block_size": 16})),
        *("source", "weight_block_size"),
    ),
    "fp8 settings are text": ("llama", quantised(blocks, config="fp8"), "source", "quantization_config"),
    "factors of what is not quantised": (
        *("llama", quantised(blocks, stored=torch.bfloat16)),
        *("source", "unexpected: "),
    ),
    "config of another family": ("llama", configured(model_type="gpt2"), "hf_config", "'gpt2' is not supported"),
    "config of another model": (
        *("llama", configured(model_type="qwen3", architectures=["Qwen3ForCausalLM"])),
        *("source", "missing: model.layers.0.self_attn.k_norm.weight"),
    ),
    "config of another size": ("llama", configured(num_hidden_layers=4), "source", "missing: model.layers.3."),
    "config with a size in words": (
        "llama",
        configured(hidden_size="large"),
        "hf_config",
        "positive whole",
    ),
    "config without layers": ("llama", configured(num_hidden_layers=-1), "hf_config", "num_hidden_layers must be a"),
    "config missing": ("llama", removed("config.json"), "source", "config.json cannot be read"),
    "config broken": ("llama", written("config.json", b'{"model_type"'), "source", "config.json cannot be read"),
    "config is no text": ("llama", written("config.json", b"\xff\xfe"), "source", "config.json cannot be read"),
    "config is a list": ("llama", written("config.json", b"[]"), "source", "does not hold a JSON object"),
    "config empty": ("llama", written("config.json", b"{}"), "hf_config", "model_type is not stated"),
    "truncated .bin": ("llama.bin", cut("pytorch_model.bin", 10), "source", "not a whole file of torch.save"),
    ".bin cut in the middle": ("llama.bin", cut("pytorch_model.bin", 30_000), "source", "not a whole file of torch.s"),
    "empty .bin": ("llama.bin", written("pytorch_model.bin", b""), "source", "is not a whole weight file"),
    ".bin is text": ("llama.bin", written("pytorch_model.bin", b"hello" * 99), "source", "not a whole file of torch.s"),
    ".bin is a bare pickle": ("llama.bin", written("pytorch_model.bin", pickle.dumps({})), "source", "not a whole"),
}
