"""The order that training sees: a function of (seed, data, sequence length, global batch, step) and of nothing else."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from swift_dist.config.job import DataSection
from swift_dist.data.loader import TrainingData
from swift_dist.data.mixture import check_data, total_steps
from swift_dist.errors import JobError, RunError
from tests.data.megatron_files import build, counting

LENGTH, GLOBAL = 8, 12


def section(train: object, **more: object) -> DataSection:
    return DataSection.model_validate({"train": train, "sequence_length": LENGTH, "prefetch": 0, **more})


def data(
    train: object, *, gbs: int = GLOBAL, mbs: int = 1, rank: int = 0, size: int = 1, seed: int = 5, **more: object
):
    return TrainingData(
        section(train, **more), seed=seed, global_batch_size=gbs, micro_batch_size=mbs, dp_rank=rank, dp_size=size
    )


def first_tokens(batch: list[dict[str, torch.Tensor]]) -> list[int]:
    return [int(row[0]) for micro in batch for row in micro["tokens"]]


def global_order(train: object, steps: int, **more: object) -> list[int]:
    loader = data(train, **more)
    out = [token for step in range(steps) for token in first_tokens(loader.micro_batches(step))]
    loader.close()
    return out


def test_micro_batch_contents(tmp_path: Path) -> None:
    prefix = counting(tmp_path / "d", 1000)
    loader = data([prefix], mbs=3)
    batch = loader.micro_batches(2)
    assert len(batch) == GLOBAL // 3
    for micro in batch:
        assert set(micro) == {"tokens", "labels", "loss_mask", "position_ids"}
        assert micro["tokens"].shape == micro["labels"].shape == (3, LENGTH)
        assert micro["tokens"].dtype == micro["labels"].dtype == micro["position_ids"].dtype == torch.int64
        assert micro["loss_mask"].dtype == torch.float32 and bool((micro["loss_mask"] == 1).all())
        assert torch.equal(micro["labels"], micro["tokens"] + 1)  # token t of this dataset is t
        assert bool((micro["tokens"][:, 0] % LENGTH == 0).all())
        assert torch.equal(micro["position_ids"], torch.arange(LENGTH).expand(3, LENGTH))
    loader.close()


@pytest.mark.parametrize("mbs", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_layout_sees_the_same_global_batches(tmp_path: Path, mbs: int, size: int) -> None:
    """Sample b of micro-batch m of rank r is sample s GBS + m MBS DP + r MBS + b of the global order."""
    gbs, steps = 24, 9
    train = [
        {"path": counting(tmp_path / "a", 700), "weight": 2},
        {"path": counting(tmp_path / "b", 500, 10000), "weight": 1},
    ]
    order = global_order(train, steps, gbs=gbs)
    loaders = [data(train, gbs=gbs, mbs=mbs, rank=rank, size=size) for rank in range(size)]
    for step in range(steps):
        for rank, loader in enumerate(loaders):
            for m, micro in enumerate(loader.micro_batches(step)):
                start = step * gbs + m * mbs * size + rank * mbs
                assert [int(row[0]) for row in micro["tokens"]] == order[start : start + mbs]


def test_the_order_does_not_depend_on_the_global_batch_or_on_where_one_starts(tmp_path: Path) -> None:
    train = [counting(tmp_path / "a", 700), counting(tmp_path / "b", 500, 10000)]
    order = global_order(train, 30, gbs=12)
    assert global_order(train, 15, gbs=24) == order
    loader = data(train)
    for step in random.Random(0).sample(range(30), 12):
        assert first_tokens(loader.micro_batches(step)) == order[step * 12 : step * 12 + 12]


def test_each_epoch_holds_each_sample_once_in_another_order(tmp_path: Path) -> None:
    samples = 50
    prefix = counting(tmp_path / "d", samples * LENGTH + 3)
    order = global_order([prefix], 4 * samples // 10, gbs=10)
    epochs = [order[k * samples : (k + 1) * samples] for k in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == [LENGTH * k for k in range(samples)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert global_order([prefix], 4, gbs=10, seed=6) != order[:40]


def test_epochs_give_every_sample_that_often(tmp_path: Path) -> None:
    train = [
        {"path": counting(tmp_path / "a", 40 * LENGTH + 1), "epochs": 2},
        {"path": counting(tmp_path / "b", 25 * LENGTH + 1, 10000), "epochs": 1},
        {"path": counting(tmp_path / "c", 30 * LENGTH + 1, 20000), "epochs": 0.5},
    ]
    assert total_steps(section(train), 12) == 120 // 12
    loader = data(train)
    assert loader.num_steps == 10
    seen = Counter(token for step in range(10) for token in first_tokens(loader.micro_batches(step)))
    assert Counter(seen[t] for t in seen if t < 10000) == {2: 40}
    assert Counter(seen[t] for t in seen if 10000 <= t < 20000) == {1: 25}
    assert Counter(seen[t] for t in seen if t >= 20000) == {1: 15}
    with pytest.raises(RunError, match="used up"):
        loader.micro_batches(10)


def test_no_weights_means_by_size_and_every_dataset_comes_round_together(tmp_path: Path) -> None:
    train = [counting(tmp_path / "a", 30 * LENGTH + 1), counting(tmp_path / "b", 90 * LENGTH + 1, 10000)]
    order = global_order(train, 20, gbs=12)
    assert Counter(order[:120]) == Counter(order[120:]) and len(set(order[:120])) == 120


def test_documents_run_into_each_other(tmp_path: Path) -> None:
    prefix = build(tmp_path / "d", [[1, 2, 3], [], [4, 5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17]])
    loader = data([prefix], gbs=2)
    rows = sorted(row.tolist() for micro in loader.micro_batches(0) for row in micro["tokens"])
    assert rows == [list(range(1, 9)), list(range(9, 17))]


def manifest(prefix: str, **facts: object) -> None:
    import json

    outputs = {s: {"bytes": Path(f"{prefix}.{s}").stat().st_size} for s in ("bin", "idx")}
    Path(f"{prefix}.manifest.json").write_text(json.dumps({"outputs": outputs, **facts}))


def test_end_of_document_tokens_get_no_loss(tmp_path: Path) -> None:
    prefix = build(tmp_path / "d", [[1, 2, 0], [3, 4, 5, 6, 0], [7, 8, 9, 1, 2, 3, 4, 5, 0]])
    with pytest.raises(JobError, match="names no end-of-document token"):
        data([prefix], gbs=2, mask_eod_loss=True)
    manifest(prefix, eod_id=0)
    loader = data([prefix], gbs=2, mask_eod_loss=True)
    for micro in loader.micro_batches(0):
        assert torch.equal(micro["loss_mask"] == 0, micro["tokens"] == 0)
    assert sum(int((micro["loss_mask"] == 0).sum()) for micro in loader.micro_batches(0)) == 2


def test_positions_begin_anew_behind_end_of_document_tokens(tmp_path: Path) -> None:
    """Against megatron's own of reset_position_ids; at the first and the last place too, and one token alone."""
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    stream = [0, 1, 2, 0, 3, 4, 5, 0] + [6, 0, 0, 7, 8, 9, 1, 2] + [3] * LENGTH + [4]
    prefix = build(tmp_path / "d", [stream])
    with pytest.raises(
        JobError, match=r"(?s)^data.separate_documents.*names no end-of-document token.*append_eod true"
    ):
        data([prefix], gbs=3, separate_documents=True)
    with pytest.raises(JobError, match=r"^data\.separate_documents"):
        check_data(section([prefix], separate_documents=True), global_batch_size=3, steps=1)
    manifest(prefix, eod_id=0)
    loader = data([prefix], gbs=3, mbs=3, separate_documents=True)
    (micro,) = loader.micro_batches(0)
    loader.close()
    for tokens, positions in zip(micro["tokens"], micro["position_ids"], strict=True):
        mask, _, wanted = _get_ltor_masks_and_position_ids(tokens, 0, True, True, False, True)
        assert torch.equal(positions, wanted)
        documents = (positions == 0).cumsum(0)
        seen = (documents[:, None] == documents) & torch.ones(LENGTH, LENGTH).tril().bool()
        assert torch.equal(~mask[0], seen)
    assert bool((micro["loss_mask"] == 1).all()), "the loss is data.mask_eod_loss's matter"


def test_tokens_beyond_the_vocabulary(tmp_path: Path) -> None:
    prefix = build(tmp_path / "d", [list(range(200))])
    loader = data([prefix])
    loader.check_vocabulary(200)
    with pytest.raises(JobError, match=r"token 199, outside the model's vocabulary of 199"):
        loader.check_vocabulary(199)
    with pytest.raises(JobError, match="token 199"):
        check_data(section([prefix]), global_batch_size=2, steps=3, vocab_size=100)
    # What the first look missed (here: a manifest that is wrong) stops the run instead of training on zeros.
    manifest(prefix, max_token_id=3)
    loader = data([prefix])
    loader.check_vocabulary(190)
    with pytest.raises(RunError, match="outside the model's vocabulary of 190"):
        for step in range(5):
            loader.micro_batches(step)


def test_validation_is_the_same_at_every_call_and_for_every_seed(tmp_path: Path) -> None:
    train, validation = counting(tmp_path / "t", 500), counting(tmp_path / "v", 50 * LENGTH + 1, 10000)
    first = data([train], validation=[validation], seed=1)
    batches = [first_tokens(batch) for batch in first.validation_batches(3)]
    assert len(batches) == 3 and all(len(batch) == GLOBAL for batch in batches)
    first.micro_batches(0)
    assert [first_tokens(batch) for batch in first.validation_batches(3)] == batches
    second = data([train], validation=[validation], seed=2)
    assert [first_tokens(batch) for batch in second.validation_batches(3)] == batches
    everything = [token for batch in first.validation_batches(100) for token in first_tokens(batch)]
    assert len(everything) == len(set(everything)) == 48  # whole batches of 50 samples, none twice
    ranks = [data([train], validation=[validation], mbs=2, rank=r, size=3).validation_batches(1)[0] for r in range(3)]
    assert Counter(t for batch in ranks for t in first_tokens(batch)) == Counter(batches[0])
    with pytest.raises(JobError, match="fewer than one global batch"):
        data([train], validation=[validation], gbs=60).validation_batches(1)
    with pytest.raises(JobError, match=r"data\.validation"):
        data([train]).validation_batches(1)


def test_a_rank_without_need_of_data_gets_as_many_empty_batches(tmp_path: Path) -> None:
    train, validation = counting(tmp_path / "t", 500), counting(tmp_path / "v", 50 * LENGTH + 1)
    idle = TrainingData(
        section([train], validation=[validation]),
        seed=5,
        global_batch_size=GLOBAL,
        micro_batch_size=1,
        dp_rank=0,
        dp_size=1,
        needs_data=False,
    )
    assert idle.micro_batches(0) == []
    assert idle.validation_batches(3) == [[], [], []]
    assert len(idle.validation_batches(100)) == len(data([train], validation=[validation]).validation_batches(100)) == 4
    idle.close()


def test_every_batch_is_checked_against_the_vocabulary(tmp_path: Path) -> None:
    prefix = counting(tmp_path / "d", 1000)  # token t is t
    loader = TrainingData(
        section([prefix], validation=[prefix]),
        seed=5,
        global_batch_size=GLOBAL,
        micro_batch_size=1,
        dp_rank=0,
        dp_size=1,
        vocab_size=990,
    )
    with pytest.raises(RunError, match="outside the model's vocabulary of 990"):
        for step in range(1000 // LENGTH // GLOBAL + 1):
            loader.micro_batches(step)
    with pytest.raises(RunError, match="outside the model's vocabulary of 990"):
        loader.validation_batches(100)
    loader.close()


def test_fingerprint_is_of_content_and_shares(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    a, b = counting(tmp_path / "a", 300), counting(tmp_path / "b", 300, 1)
    for suffix in ("bin", "idx"):
        shutil.copy(f"{a}.{suffix}", tmp_path / "x" / f"moved.{suffix}")

    def of(train: object, **more: object) -> str:
        return data(train, **more).fingerprint()

    assert of([a]) == of([str(tmp_path / "x" / "moved")]) == of([a], seed=9, gbs=6)
    assert of([a]) != of([b])
    assert of([a, b]) != of([b, a])
    weighted = [{"path": a, "weight": 1}, {"path": b, "weight": 2}]
    assert of(weighted) != of([a, b])
    assert of(weighted) == of([{"path": a, "weight": 2}, {"path": b, "weight": 4}])
    assert of([{"path": a, "epochs": 1}]) != of([{"path": a, "epochs": 2}])


WRONG = {
    "no data": ([], "no dataset given"),
    "weight and epochs in one": ([{"path": "a", "weight": 1, "epochs": 1}], "both weight and epochs"),
    "one with weight": ([{"path": "a", "weight": 1}, "b"], "give every dataset weight"),
    "weight beside epochs": ([{"path": "a", "weight": 1}, {"path": "b", "epochs": 1}], "give every dataset weight"),
    "a weight of nothing": ([{"path": "a", "weight": 1e-18}, {"path": "b", "weight": 1}], "is no sample beside"),
    "too short": (["short"], "fewer than one sample"),
    "less than a sample": ([{"path": "a", "epochs": 0.001}], "no sample"),
    "missing": (["nowhere"], "does not exist"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_data_sections(tmp_path: Path, name: str) -> None:
    for prefix, size in (("a", 300), ("b", 300), ("short", LENGTH)):
        counting(tmp_path / prefix, size)
    entries, words = WRONG[name]
    train = [
        str(tmp_path / e) if isinstance(e, str) else {**e, "path": str(tmp_path / e["path"])}
        for e in entries  # type: ignore[attr-defined]
    ]
    with pytest.raises(JobError) as caught:
        data(train)
    assert caught.value.key == "data.train" and words in str(caught.value)


def test_jobs_that_ask_for_more_than_there_is(tmp_path: Path) -> None:
    prefix = counting(tmp_path / "a", 30 * LENGTH + 1)
    finite = section([{"path": prefix, "epochs": 2}])
    assert check_data(finite, global_batch_size=7) == 8
    assert check_data(finite, global_batch_size=7, steps=5) == 5
    with pytest.raises(JobError, match=r"lower train\.steps to 8"):
        check_data(finite, global_batch_size=7, steps=9)
    with pytest.raises(JobError, match=r"train\.steps"):
        check_data(finite, global_batch_size=61)
    with pytest.raises(JobError, match=r"give train\.steps"):
        total_steps(section([prefix]), 7)
    with pytest.raises(JobError, match=r"data\.validation"):
        check_data(finite, global_batch_size=7, eval_steps=2)
    with pytest.raises(JobError, match=r"train\.global_batch_size"):
        data([prefix], gbs=12, mbs=5)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "data-prefetch"]


def test_prefetch_reads_ahead_goes_back_and_ends(tmp_path: Path) -> None:
    prefix = counting(tmp_path / "d", 2000)
    order = global_order([prefix], 12)
    loader = data([prefix], prefetch=3)
    for step in [0, 1, 2, 3, 1, 2, 7, 8, 0]:
        assert first_tokens(loader.micro_batches(step)) == order[step * 12 : step * 12 + 12]
    assert len(threads()) == 1
    deadline = time.monotonic() + 30
    while loader._prefetch._ready.qsize() < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loader._prefetch._ready.qsize() == 3
    loader.micro_batches(1)
    assert 0 <= loader.wait_seconds < 10
    loader.close()
    loader.close()
    assert not threads()


def test_prefetch_raises_at_the_step_that_failed(tmp_path: Path) -> None:
    prefix = counting(tmp_path / "d", 2000)
    loader = data([prefix], prefetch=2)
    loader.micro_batches(0)
    Path(f"{prefix}.bin").write_bytes(b"")
    with pytest.raises(RunError, match="became shorter"):
        for step in range(1, 6):  # the first ones were read before
            loader.micro_batches(step)
    assert not threads()
    loader.close()


def test_prefetch_stops_at_the_end_of_the_epochs(tmp_path: Path) -> None:
    loader = data([{"path": counting(tmp_path / "d", 36 * LENGTH + 1), "epochs": 1}], prefetch=8)
    seen = [token for step in range(3) for token in first_tokens(loader.micro_batches(step))]
    assert len(set(seen)) == 36
    with pytest.raises(RunError, match="used up"):
        loader.micro_batches(3)
    loader.close()


def test_the_first_import_pays_for_neither_torch_nor_megatron() -> None:
    import subprocess
    import sys

    code = "import sys, swift_dist.data.loader; print(sorted({'torch', 'megatron', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_loader_reads_what_megatron_holds(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    draw = np.random.default_rng(0)
    prefix = build(tmp_path / "d", [draw.integers(0, 60000, size).tolist() for size in draw.integers(0, 90, 60)])
    reference = IndexedDataset(prefix)
    stream = np.concatenate([reference[i] for i in range(len(reference))])
    windows = {tuple(stream[k : k + LENGTH].tolist()) for k in range(0, len(stream) - LENGTH, LENGTH)}
    loader = data([prefix], gbs=len(windows))
    assert {tuple(row.tolist()) for micro in loader.micro_batches(0) for row in micro["tokens"]} == windows
