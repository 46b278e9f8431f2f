"""`data prepare --launcher ray`: the same bytes from actors of a Ray cluster; what becomes of an actor's error."""

from __future__ import annotations

from pathlib import Path

import pytest

from swift_dist.data import preparation
from swift_dist.data.prepare import PrepareOptions, prepare
from swift_dist.errors import JobError, RunError
from swift_dist.workers.pool import from_queue, run_all
from swift_dist.workers.ray_pool import RayPool
from tests.data.corpora import compress, files, jsonl, megatron, texts
from tests.workers.toy import Toy


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each, on this machine."""
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_AUTH_MODE", "disabled")
    patch.delenv("RAY_ADDRESS", raising=False)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    yield nodes.address
    nodes.shutdown()
    patch.undo()


@pytest.mark.slow
def test_ray_actors_make_the_same(
    tmp_path: Path, tokenizer: str, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(preparation, "unit_size", lambda found: 3000)
    documents = texts(300)
    (tmp_path / "a.jsonl").write_bytes(jsonl(documents[:200]))
    (tmp_path / "b.jsonl.zst").write_bytes(compress(jsonl(documents[200:]), ".zst"))
    given = {
        "input": (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.zst")),
        "tokenizer": tokenizer,
        "launcher": "ray",
        "ray_address": cluster,
    }
    prepare(PrepareOptions(**given, output=str(tmp_path / "out")))
    assert files(tmp_path / "out") == megatron(tmp_path / "ref", documents, tokenizer)
    assert not ray.is_initialized()  # disconnected
    with (tmp_path / "a.jsonl").open("ab") as stream:
        stream.write(b"{half\n")
    with pytest.raises(RunError, match=r"a\.jsonl:201: not JSON"):
        prepare(PrepareOptions(**given, output=str(tmp_path / "bad")))
    # what the actors made is taken up by processes of this machine
    given |= {"launcher": "local", "ray_address": None}
    result = prepare(PrepareOptions(**given, output=str(tmp_path / "bad"), on_error="skip"))
    assert result["resumed_units"] > 0 and result["skipped"] == 1
    assert files(tmp_path / "bad") == files(tmp_path / "out")


@pytest.mark.slow
def test_errors_of_actors(tmp_path: Path, cluster: str) -> None:
    """A command's error comes back as itself; a node must see the folder."""
    with pytest.raises(JobError, match="is wrong") as caught:
        pool = RayPool(Toy(), cluster, 2, tmp_path)
        try:
            run_all(from_queue([("square", 1), ("job_error", "a.key")]), pool.workers, lambda result: None)
        finally:
            pool.close()
    assert (caught.value.key, caught.value.remedy) == ("a.key", "correct it")
    with pytest.raises(RunError, match=r"does not see .*absent"):
        RayPool(Toy(), cluster, 1, tmp_path / "absent")


def test_no_cluster(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a"]))
    options = PrepareOptions(
        input=(str(tmp_path / "a.jsonl"),),
        output=str(tmp_path / "out"),
        tokenizer=tokenizer,
        launcher="ray",
        ray_address="127.0.0.1:1",
    )
    with pytest.raises(JobError, match="no Ray cluster answers"):
        prepare(options)
    assert not list(tmp_path.glob("out*"))
