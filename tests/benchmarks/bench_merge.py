"""Memory and time of `merge` beside those of the whole model in PEFT, for a model of 1.2 GB in several files.

A process of each way merges the same LoRA adapter of all projections: `swift_dist.tuners.merge`, and PEFT's
`merge_and_unload` of the whole model in fp32 (as transformers and PEFT document it), written by `save_pretrained`.
Memory is the kernel's high-water mark of the process (VmHWM of /proc, from which what the imports take is subtracted),
mapped files included. To hold: ours is below 0.5 x the model's weights, and every tensor is PEFT's, bit for bit.

    python tests/benchmarks/bench_merge.py [--layers 36] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHARD = "200MB"
WAYS = {
    "ours": """
from swift_dist.tuners import merge
def run(base, adapter, target):
    merge(base, adapter, target, max_shard_size="200MB")
""",
    "PEFT, whole": """
def run(base, adapter, target):
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    dtype = model.dtype
    merged = PeftModel.from_pretrained(model.float(), adapter).merge_and_unload(safe_merge=True)
    merged.to(dtype).save_pretrained(target, max_shard_size="200MB")
""",
}
MEASURED = """
import json, sys, time
from pathlib import Path
import torch, safetensors.torch, accelerate
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
def status(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) * 1024
%s
before, began = status("VmRSS"), time.monotonic()
Path("/proc/self/clear_refs").write_text("5")
run(*map(Path, sys.argv[1:]))
print(json.dumps({"bytes": status("VmHWM") - before, "seconds": time.monotonic() - began}))
"""


def make(folder: Path, layers: int) -> tuple[Path, Path]:
    """A random bf16 model in files of 200 MB, and an adapter of rank 16 of all its projections."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 8}
    config = LlamaConfig(vocab_size=32000, num_hidden_layers=layers, **sizes, dtype="bfloat16")  # type: ignore[arg-type]
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size=SHARD)
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(str(folder / "adapter"))
    return folder / "base", folder / "adapter"


def measured(way: str, base: Path, adapter: Path, target: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", MEASURED % WAYS[way], *map(str, (base, adapter, target))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def equal(ours: Path, theirs: Path) -> bool:
    import torch
    from safetensors import safe_open

    def places(folder: Path) -> dict[str, str]:
        found: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        return found

    a, b = places(ours), places(theirs)
    if a.keys() != b.keys():
        return False
    for name in a:
        with safe_open(ours / a[name], "pt") as left, safe_open(theirs / b[name], "pt") as right:
            if not torch.equal(left.get_tensor(name), right.get_tensor(name)):
                return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--folder", help="where to work (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        base, adapter = make(folder, options.layers)
        files = list(base.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        beside = (adapter / "adapter_model.safetensors").stat().st_size
        print(f"{size / 1e9:.2f} GB in {len(files)} files, bf16; adapter {beside / 1e9:.2f} GB")
        ratios = {}
        for way in WAYS:
            found = measured(way, base, adapter, folder / way)
            ratios[way] = found["bytes"] / size
            print(f"{way:12} {found['bytes'] / 1e9:5.2f} GB = {ratios[way]:.2f} x the model, {found['seconds']:.1f} s")
        same = equal(*(folder / way for way in WAYS))
        print("every tensor is the same" if same else "tensors DIFFER")
        return 0 if same and ratios["ours"] < 0.5 else 1


if __name__ == "__main__":
    raise SystemExit(main())
