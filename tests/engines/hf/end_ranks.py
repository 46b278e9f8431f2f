"""A whole run on forked ranks, and what its export computes, beside what the trained model did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sft_ranks
import torch

IDS, LENGTHS = torch.arange(5, 17)[None], [7, 5]


def train_and_reload(
    worker: Any, payload: dict[str, Any], run_dir: str, base: str, merged: str | None = None
) -> dict[str, Any]:
    """Largest differences of logits: what training changed, the export against the model as it was trained (in the
    engine, at its end), and the export merged into its base against that (None: not asked for)."""
    from swift_dist.engines.hf.engine import HFEngine

    trained: list[torch.Tensor] = []
    export = HFEngine.export

    def exporting(engine: HFEngine, folder: Path) -> Path | None:
        with torch.no_grad(), engine.inference():
            trained.append(_logits(engine.strategy.module))
        return export(engine, folder)

    HFEngine.export = exporting  # type: ignore[method-assign]
    result = sft_ranks.train(worker, payload, run_dir)
    if worker.rank:
        return {}
    (wanted,) = trained
    found = _loaded(result["export"], base)
    difference = {"learnt": _distance(_logits(_plain(base)), wanted), "reloaded": _distance(_logits(found), wanted)}
    if merged:
        from swift_dist import cli

        assert cli.main(["merge", result["export"], merged]) == 0
        difference["merged"] = _distance(_logits(_plain(merged)), wanted)
    return {**result, **difference}


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def _plain(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    from swift_dist.engines.hf import attention

    attention.register()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention.NAME).eval()


def _loaded(export: str, base: str) -> Any:
    if not (Path(export) / "adapter_config.json").exists():
        return _plain(export)
    from peft import PeftModel

    return PeftModel.from_pretrained(_plain(base), export).eval()


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    """Of two sequences side by side, as the engine lays them out."""
    from swift_dist.engines.hf.attention import boundaries

    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    arguments = boundaries(LENGTHS, torch.device("cpu"))
    return model(input_ids=IDS, position_ids=positions, use_cache=False, **arguments).logits
