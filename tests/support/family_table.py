"""The table of families: small random models converted, loaded by megatron-core, compared, and converted back."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from swift_dist.convert.listing import VERIFIED, measurements, passes, read_verified
from swift_dist.models import find_family

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "tables" / "families.md"
TOLERANCE = 1e-4
LAYERS = 4  # two pipeline stages of two chunks each
LAYOUTS: dict[str, dict[str, int]] = {
    "TP1": {"tp": 1},
    "TP2": {"tp": 2},
    "PP2": {"pp": 2},
    "TP2PP2": {"tp": 2, "pp": 2},
    "PP2xVPP2": {"pp": 2, "vpp": 2},
    "EP2": {"ep": 2},
    "EP2PP2": {"ep": 2, "pp": 2},
    "TP2EP2": {"tp": 2, "ep": 2},
    "TP2EP2ETP1": {"tp": 2, "ep": 2, "etp": 1},
}


def load_module(place: str) -> ModuleType:
    """A file of the tests as a module: there is no package of them."""
    spec = importlib.util.spec_from_file_location(f"family_table_{Path(place).stem}", TESTS / place)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tiny_models = load_module("converters/tiny_models.py")
NAMES: tuple[str, ...] = tuple(tiny_models.CONFIGS)


def is_trained(name: str) -> bool:
    return name in tiny_models.TRAINED


def layouts_of(name: str) -> list[str]:
    """Layouts that a model is measured at: one rank where only the tests build it; no expert parallelism without
    experts."""
    if not is_trained(name):
        return ["TP1"]
    config = {**tiny_models.COMMON, **tiny_models.CONFIGS[name], "model_type": tiny_models.model_type(name)}
    is_moe = find_family(config).shape(config).is_moe
    return [layout for layout, degrees in LAYOUTS.items() if is_moe or "ep" not in degrees]


def write_model(name: str, folder: Path, **changes: Any) -> None:
    """A model with weights so large that attention is sharp, or rotations would hardly count; every value drawn."""
    import torch

    model = tiny_models.tiny_model(name, num_hidden_layers=LAYERS, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * 4 if parameter.dim() > 1 else parameter + 1)
    model.save_pretrained(folder)
    if name.endswith("_mtp"):
        tiny_models.add_mtp_layer(folder)


def to_megatron(source: Path, target: Path) -> Path:
    from swift_dist.convert import hf_to_megatron as verb

    verb.run(verb.HFToMegatronOptions(source=str(source), target=str(target), workers=1))
    return target


def to_hf(source: Path, target: Path) -> Path:
    from swift_dist.convert import megatron_to_hf as verb

    verb.run(verb.MegatronToHFOptions(source=str(source), target=str(target), workers=1))
    return target


def round_trip(before: Path, after: Path) -> dict[str, int]:
    """Tensors of two Hugging Face folders, and how many are the same: name, shape, dtype, every bit."""
    from safetensors.torch import load_file
    from torch import int32

    ours, theirs = (load_file(folder / "model.safetensors") for folder in (after, before))
    assert all(values.element_size() == 4 for values in theirs.values())
    same = [
        name
        for name in ours.keys() & theirs.keys()
        if (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape)
        and bool((ours[name].view(int32) == theirs[name].view(int32)).all())
    ]
    return {"tensors": len(ours.keys() | theirs.keys()), "equal": len(same)}


def logits(hf: Path, checkpoint: Path, layouts: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Cells by layout, from the command that compares logits."""
    file = folder / "request.json"
    request = {"hf": str(hf), "checkpoint": str(checkpoint), "layouts": [LAYOUTS[layout] for layout in layouts]}
    file.write_text(json.dumps(request))
    command = [sys.executable, "-m", "swift_dist.engines.megatron.logits", str(file)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.stdout, done.stderr
    answer = json.loads(done.stdout)
    assert answer["scale"] > 1, "logits that are all small prove little"
    return {
        layout: {key: found[key] for key in ("relative", "same_argmax", "error")}
        for layout, found in zip(layouts, answer["layouts"], strict=True)
    }


def logits_in_a_rank(worker: Any, hf: str, checkpoint: str) -> dict[str, Any]:
    """The same cell of a family that the engine does not train: megatron-core's model as tests/models builds it, loaded
    by megatron-core. In a process of its own, the only rank."""
    import torch
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from swift_dist.engines.megatron import logits as command
    from swift_dist.engines.megatron import state

    families = load_module("models/test_conversion_families.py")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    config = json.loads((Path(hf) / "config.json").read_text())
    family = find_family(config)
    config = family.for_folder(config, load_file(Path(hf) / "model.safetensors").keys())
    prompts = command.default_prompts(family.shape(config))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(hf, attn_implementation="eager").eval()
        expected = [theirs(torch.tensor([prompt])).logits[0] for prompt in prompts]
        model = families.build(family, config)
        for tensor in families.live_tensors(model).values():
            tensor.fill_(torch.nan)
        wanted = state._model_state(model.sharded_state_dict(metadata={"non_homogeneous_layers": True}), fp8=False)
        loaded, unused, absent = dist_checkpointing.load(
            {"model": wanted}, checkpoint, strict=StrictHandling.RETURN_ALL
        )
        assert not unused and not absent, (unused, absent)
        state._load_model(model, loaded["model"])
        assert all(bool(tensor.isfinite().all()) for tensor in families.live_tensors(model).values())
        model.mtp_process, model.config.mtp_num_layers = False, None  # it is for training: megatron asks for labels
        found = [model(torch.tensor([prompt]), torch.arange(len(prompt))[None], None)[0] for prompt in prompts]
    pairs = list(zip(found, expected, strict=True))
    scale = max(float(each.abs().max()) for each in expected)
    assert scale > 1
    return {
        "relative": max(float((mine - other).abs().max()) for mine, other in pairs) / scale,
        "same_argmax": all(torch.equal(mine.argmax(-1), other.argmax(-1)) for mine, other in pairs),
        "error": None,
    }


def record(name: str, trip: dict[str, int], layouts: dict[str, dict[str, Any]]) -> None:
    """Put a model's measurements into verified.json, in place of its former ones, and write the page anew."""
    known = read_verified()["models"] if VERIFIED.exists() else {}
    known[name] = {
        "family": tiny_models.model_type(name),
        "date": str(datetime.date.today()),
        "versions": {
            "Python": platform.python_version(),
            **{package: version(package) for package in ("torch", "megatron-core", "transformers", "safetensors")},
        },
        "round_trip": trip,
        "layouts": layouts,
    }
    models = {name: known[name] for name in NAMES if name in known}
    text = json.dumps({"tolerance": TOLERANCE, "models": models}, indent=1)
    VERIFIED.write_text(text + "\n", encoding="utf-8")
    PAGE.write_text(page(read_verified()), encoding="utf-8")


def page(verified: dict[str, Any]) -> str:
    """The table as Markdown."""
    models = verified["models"]
    lines = [
        "# Families",
        "",
        "Small random models of every family, in fp32, through `swift-dist convert hf-to-megatron`. *Round trip*:",
        "tensors that are equal bit for bit, of all, after `convert megatron-to-hf`. The other columns: megatron-core",
        "loads the checkpoint at that layout; largest difference of its logits from transformers' at all positions of",
        f"prompts of 1 to 33 tokens, relative to the largest logit. Allowed: {verified['tolerance']:g}, and the same",
        "likeliest token everywhere; what is not allowed is marked `!`. `n/a`: the model has no experts. `-`: the",
        "engine does not train the family; at TP1 it is megatron-core's own model, as",
        "`tests/models/test_conversion_families.py` builds it and compares it with our mapping, key by key and shape",
        "by shape.",
        "",
        "Rewritten by `make tables`, with what `swift-dist convert --list` says. Models:",
        "`tests/converters/tiny_models.py`.",
        "",
        *(f"{text}; CPU, gloo" for text in measurements(models)),
        "",
        "| | round trip | " + " | ".join(LAYOUTS) + " |",
        "|---|---|" + "---|" * len(LAYOUTS),
    ]
    for name, model in models.items():
        trip = model["round_trip"]
        cells = [f"{trip['equal']} of {trip['tensors']}" + ("" if trip["equal"] == trip["tensors"] else " !")]
        cells += [_entry(name, model["layouts"].get(layout), verified["tolerance"]) for layout in LAYOUTS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _entry(name: str, cell: dict[str, Any] | None, tolerance: float) -> str:
    if cell is None:
        return "n/a" if is_trained(name) else "-"
    text = "no numbers" if cell["error"] else f"{cell['relative']:.0e}"
    return text if passes(cell, tolerance) else f"{text} !"
