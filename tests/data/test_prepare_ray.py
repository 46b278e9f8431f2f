"""`data prepare --launcher ray`: the same bytes from actors of a Ray cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from swift_dist.data import preparation
from swift_dist.data.prepare import PrepareOptions, prepare
from swift_dist.errors import RunError
from tests.data.corpora import compress, files, jsonl, megatron, texts


@pytest.mark.slow
def test_ray_actors_make_the_same(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(preparation, "unit_size", lambda found: 3000)
    documents = texts(300)
    (tmp_path / "a.jsonl").write_bytes(jsonl(documents[:200]))
    (tmp_path / "b.jsonl.zst").write_bytes(compress(jsonl(documents[200:]), ".zst"))
    given = {
        "input": (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.zst")),
        "tokenizer": tokenizer,
        "launcher": "ray",
        "workers": 2,
    }
    prepare(PrepareOptions(**given, output=str(tmp_path / "out")))
    assert files(tmp_path / "out") == megatron(tmp_path / "ref", documents, tokenizer)
    assert not ray.is_initialized()  # the cluster was its own, and is gone
    with (tmp_path / "a.jsonl").open("ab") as stream:
        stream.write(b"{half\n")
    with pytest.raises(RunError, match=r"a\.jsonl:201: not JSON"):
        prepare(PrepareOptions(**given, output=str(tmp_path / "bad")))
    assert not ray.is_initialized()
