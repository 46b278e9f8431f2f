"""QLoRA on bases that bitsandbytes quantises on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError

from tests.tuners.tiny import batch, difference, export, learning, load, logits, stack_of, tiny_folder, train


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough for whole blocks of 64 values that share a scale."""
    folder = tmp_path_factory.mktemp("base")
    return tiny_folder(folder, hidden_size=64, intermediate_size=128, num_hidden_layers=2)


def quantised(base: Path, stack: Any) -> Any:
    return load(base, dtype=torch.float32, **stack.load_arguments())


@pytest.mark.parametrize(
    "options",
    [
        {"compute_dtype": "fp32", "quant_type": "nf4"},
        {"compute_dtype": "fp32", "quant_type": "fp4", "double_quant": False},
        {"bits": 8},
    ],
)  # fmt: skip
def test_an_adapter_of_a_quantised_base_reloads_on_one(options, base, tmp_path):
    stack = stack_of("qlora", qlora=options)
    model = stack.apply(quantised(base, stack), seed=0)
    stored = {p.dtype for n, p in model.named_parameters() if "q_proj.base_layer" in n}
    assert stored == {torch.int8 if options.get("bits") == 8 else torch.uint8}
    assert all(".lora_" in name for name in learning(model))
    train(model, stack)
    trained = logits(model)
    folder = export(model, stack, tmp_path / "out")
    again = quantised(base, stack)
    for module in again.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # a product in bf16
    again = PeftModel.from_pretrained(again, folder)
    assert difference(logits(again), trained) < 1e-6
    with again.disable_adapter():
        assert difference(logits(again), trained) > 1e-3
    whole = PeftModel.from_pretrained(load(base), folder)
    assert 1e-4 < difference(logits(whole), trained) < 0.5, "the base's own weights differ by their rounding"


def test_an_evaluation_leaves_the_gradients_as_they_were(base):
    """On a CPU with AVX512-BF16, bitsandbytes would repack the weights in it, for a product without a gradient."""
    stack = stack_of("qlora", qlora={"compute_dtype": "fp32"})
    model = stack.apply(quantised(base, stack), seed=0)
    train(model, stack)

    def gradients() -> dict[str, torch.Tensor]:
        model.train()
        model.zero_grad()
        model(input_ids=batch()).logits.log_softmax(-1)[..., 1].mean().neg().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    logits(model)
    after = gradients()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_what_bitsandbytes_is_asked_for():
    config = stack_of("qlora").load_arguments()["quantization_config"]
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert stack_of("qlora", qlora={"bits": 8}).load_arguments()["quantization_config"].load_in_8bit
    assert stack_of("lora,neftune").load_arguments() == {}


def test_inits_that_change_the_base_are_refused():
    with pytest.raises(ValidationError, match="default"):
        stack_of("qlora", qlora={"init": "pissa"})
