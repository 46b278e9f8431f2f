"""Checkpoints go from machines with transformer-engine to machines without, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch


class Scaled(torch.nn.Linear):
    """As transformer-engine's modules: a state dict has an entry of scaling factors beside the weights."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0)

    def set_extra_state(self, state: Any) -> None:
        pass


def test_without_fp8_the_scales_are_neither_saved_nor_missed() -> None:
    from swift_dist.engines.megatron.state import _load_model, _model_state

    model = torch.nn.Sequential(Scaled(2, 3))
    whole = dict(model.state_dict())
    assert "0._extra_state" in whole
    saved = _model_state(whole, fp8=False)
    assert sorted(saved) == ["0.bias", "0.weight"]
    assert _model_state(whole, fp8=True) == whole
    other = torch.nn.Sequential(Scaled(2, 3))
    _load_model(other, saved)
    assert torch.equal(other[0].weight, model[0].weight)
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        _load_model(other, {"0.bias": saved["0.bias"]})
    with pytest.raises(RuntimeError, match="more"):
        _load_model(other, {**saved, "more": torch.zeros(1)})
