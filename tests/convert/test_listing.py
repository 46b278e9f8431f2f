"""`convert --list`: every family, with what was measured; nothing that failed is called verified."""

from __future__ import annotations

import json
from typing import Any

import pytest

from swift_dist import cli
from swift_dist.convert import listing
from swift_dist.models import families


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["convert", "--list", *words]) == 0
    return capsys.readouterr().out


def test_every_family_with_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(answer(capsys, "--json"))
    verified = listing.read_verified()
    assert [family["name"] for family in found["families"]] == [family.name for family in families()]
    for entry, family in zip(found["families"], families(), strict=True):
        assert (entry["architectures"], entry["trained"]) == (list(family.architectures), family.trainable)
        models = [verified["models"][name] for name in entry["models"]]
        worst = max(cell["relative"] for model in models for cell in model["layouts"].values())
        assert max(entry["layouts"].values()) == worst <= found["tolerance"]
        assert entry["failed"] == []
        tensors = sum(model["round_trip"]["tensors"] for model in models)
        assert entry["round_trip"] == {"tensors": tensors, "equal": tensors}
    assert found["measured"].keys() == verified["models"].keys()


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    lines = answer(capsys).splitlines()
    rows = {line.split()[0]: line for line in lines[1 : 1 + len(families())]}
    assert rows.keys() == {family.name for family in families()}
    assert "LlamaForCausalLM" in rows["llama"] and rows["llama"].endswith("TP1 TP2 PP2 TP2PP2 PP2xVPP2")
    assert "EP2" in rows["qwen3_moe"] and " trained " in rows["qwen3_moe"]
    assert "converted only" in rows["mixtral"] and rows["mixtral"].endswith(" TP1")
    assert "allowed: 0.0001" in lines[-2] and "megatron-core 0." in lines[-1]


def cell(relative: float | None, same_argmax: bool | None = True, error: str | None = None) -> dict[str, Any]:
    return {"relative": relative, "same_argmax": same_argmax, "error": error}


def model(date: str, round_trip: dict[str, int], **layouts: dict[str, Any]) -> dict[str, Any]:
    versions = {"torch": "2"}
    return {"family": "llama", "date": date, "versions": versions, "round_trip": round_trip, "layouts": layouts}


@pytest.mark.parametrize("bad", [cell(2e-4), cell(1e-6, False), cell(None, None, "lacks weights")])
def test_what_failed_is_not_verified(monkeypatch: pytest.MonkeyPatch, bad: dict[str, Any]) -> None:
    """Also where another model of the family passed; and a family that nobody measured says so."""
    models = {
        "llama": model("2026-01-01", {"tensors": 5, "equal": 5}, TP1=cell(3e-7), TP2=bad),
        "other": model("2026-01-02", {"tensors": 7, "equal": 6}, TP1=cell(5e-7), TP2=cell(1e-7)),
    }
    monkeypatch.setattr(listing, "read_verified", lambda: {"tolerance": 1e-4, "models": models})
    found = listing.run(listing.ListOptions())
    llama = next(family for family in found["families"] if family["name"] == "llama")
    assert (llama["layouts"], llama["failed"]) == ({"TP1": 5e-7}, ["TP2"])
    lines = listing.render(found).splitlines()
    rows = {line.split()[0]: line for line in lines[1 : 1 + len(families())]}
    assert "11 of 12" in rows["llama"] and rows["llama"].split()[-4:] == ["5e-07", "TP1", "NOT", "TP2"]
    assert rows["qwen2"].endswith("not measured")
    assert [line.split("; ")[1] for line in lines[-2:]] == ["llama: 2026-01-01, torch 2", "other: 2026-01-02, torch 2"]
