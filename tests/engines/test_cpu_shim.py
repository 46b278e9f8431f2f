"""The CPU shim in processes of their own: applying it changes global state."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_undoing_puts_every_slot_back() -> None:
    code = """
import torch
from swift_dist.engines.megatron import cpu_shim
def slots():
    pairs = [slot.split(":") for slot in cpu_shim._torch_slots()]
    return {(path, name): vars(cpu_shim._resolve(path)).get(name) for path, name in pairs}
before = slots()
compiler = torch.compile
undo = cpu_shim.apply()
assert torch.compile is compiler
assert torch.cuda.current_device() == torch.device("cpu")
from megatron.core.optimizer import clip_grads
assert clip_grads.torch.zeros(1, device="cuda").device.type == "cpu"
cpu_shim.apply()()                       # a second one changes nothing
assert torch.cuda.current_device() == torch.device("cpu")
undo()
after = slots()
assert before == after, [slot for slot in before if before[slot] is not after[slot]]
assert clip_grads.torch is torch
print("ok")
"""
    assert run(code) == "ok"


def test_the_norm_of_a_large_gradient() -> None:
    code = """
import torch
from swift_dist.engines.megatron import cpu_shim
cpu_shim.apply()
from megatron.core.optimizer import clip_grads
gradients = [torch.full((3_000_000,), 1e-3), torch.ones(1)]
norm, _ = clip_grads.l2_norm_impl(2048, torch.zeros(1), [gradients], False)
print(abs(float(norm) - 2.0) < 1e-5)
"""
    assert run(code) == "True"


def test_tensors_tell_only_megatron_that_they_are_on_cuda() -> None:
    code = """
import torch
from swift_dist.engines.megatron import cpu_shim
cpu_shim.apply()
print(torch.ones(1).type(), torch.ones(1).type(torch.int64).dtype, end=" ")
exec("print(torch.ones(1).type())", {"__name__": "megatron.core.anything", "torch": torch})
"""
    assert run(code) == "torch.FloatTensor torch.int64 torch.cuda.FloatTensor"


def test_another_megatron_is_refused() -> None:
    code = """
import importlib.metadata
importlib.metadata.version = lambda name: "0.17.0"
from swift_dist.engines.megatron import cpu_shim
from swift_dist.errors import RunError
try:
    cpu_shim.apply()
except RunError as error:
    print(error.message, "|", error.remedy)
"""
    printed = run(code)
    assert "0.17.0" in printed and "pip install megatron-core==0.16.1" in printed


def test_starting_the_engine_imports_nothing_heavy_that_it_does_not_use() -> None:
    """Imports are most of a rank's start."""
    code = """
import sys
from swift_dist.engines.megatron import cpu_shim
cpu_shim.apply()
from swift_dist.engines.megatron import engine, groups, model, optimizer, rng, settings, state, step, weights
print([name for name in ("transformers", "torch._inductor", "torch._dynamo", "ray") if name in sys.modules])
"""
    assert run(code) == "[]"
