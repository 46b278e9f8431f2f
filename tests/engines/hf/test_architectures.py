"""transformers' causal language models, each from a tiny random config: LoRA for two steps, save, reload, merge.

`pytest tests/engines/hf` runs some; `pytest -m table tests/engines/hf` all, and rewrites docs/tables/architectures.md.
"""

from __future__ import annotations

import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import chat_model
import pytest
from sft_runs import Runs

FILE = Path(__file__).with_name("architecture_ranks.py")
PAGE = Path(__file__).parents[3] / "docs" / "tables" / "architectures.md"
SOME = ["gpt2", "qwen3_moe", "gemma3_text", "mamba", "deepseek_v3"]


@pytest.fixture(scope="module")
def runs(gang: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(gang, tmp_path_factory.mktemp("architectures"))


def attempt(runs: Runs, model_type: str) -> dict[str, Any]:
    """{"class", "packs", "changed", "merged", "packed"}, or {"error"} with the step that failed."""
    folder = runs.folder / model_type
    folder.mkdir(exist_ok=True)
    step = "making a tiny model"
    try:
        made = runs.gang.run(FILE, "save_tiny", 1, model_type=model_type, folder=str(folder / "base"), seconds=100)[0]
        if "error" in made:
            return {"error": f"{step}: {made['error']}"}
        chat_model.save_tokenizer(folder / "base")
        step = "LoRA of 2 steps"
        job = runs.job(
            model={"path": str(folder / "base")},
            tuner={"name": ["lora"], "lora": {"rank": 4}},
            train={"steps": 2, "global_batch_size": 2},
            optimizer={"lr": 1e-2},
        )
        result = runs.run(job, 1, seconds=100)[1][0]
        step = "reload and merge"
        places = {"base": str(folder / "base"), "adapter": result["export"], "merged": str(folder / "merged")}
        return made | runs.gang.run(FILE, "reload", 1, packs=made["packs"], seconds=100, **places)[0]
    except Exception as error:
        text = (str(error) or "no message").splitlines()[0].replace(str(runs.folder), "FOLDER")
        return {"error": f"{step}: {type(error).__name__}: {text[:160]}"}


def verdict(found: dict[str, Any]) -> str:
    """ "" if all is well, else what is not."""
    if "error" in found:
        return found["error"]
    if not found["changed"] > 0:  # written so that NaN is no good answer either
        return "the adapter changes nothing"
    if not found["merged"] <= 1e-4:
        return f"merged weights compute something else ({found['merged']:.1g})"
    if not found["packed"] <= 1e-4:
        return f"packed sequences are not as alone ({found['packed']:.1g})"
    return ""


@pytest.mark.parametrize("model_type", SOME)
def test_some(runs: Runs, model_type: str) -> None:
    assert verdict(attempt(runs, model_type)) == ""


@pytest.mark.table
@pytest.mark.timeout(7200)
def test_all(runs: Runs) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = {name: attempt(runs, name) for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}
    bad = {name: text for name, each in found.items() if (text := verdict(each))}
    good = {name: each for name, each in found.items() if name not in bad}
    lines = [
        "# transformers' causal language models",
        "",
        f"{len(good)} of {len(found)} architectures of transformers {version('transformers')} went through LoRA",
        "SFT of two steps from a tiny random config, were saved, loaded again by PEFT, and merged, with equal logits",
        f"(1e-4 of the largest). {datetime.datetime.now(datetime.UTC).date()}, peft {version('peft')},",
        f"torch {version('torch')}, on CPU;",
        "`make tables` makes this page. *packs*: sequences lie side by side in one row, and compute what each computes",
        "alone.",
        "",
        "| model_type | class | packs |",
        "|---|---|---|",
        *(f"| {name} | {each['class']} | {'yes' if each['packs'] else '-'} |" for name, each in sorted(good.items())),
        "",
        "## Not these",
        "",
        *(f"- `{name}`: {text}" for name, text in sorted(bad.items())),
    ]
    PAGE.write_text("\n".join(lines) + "\n")
    mixed = [name for name, text in bad.items() if text.startswith("packed sequences are not as alone")]
    assert not mixed, f"these would mix documents in silence: {mixed}"
