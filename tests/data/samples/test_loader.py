"""Micro-batches: their tensors against a naive reference, and which samples every rank gets at every step."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swift_dist.data.samples.loader import SampleData
from swift_dist.data.samples.opening import open_samples, stores_as_values
from swift_dist.data.samples.store import SampleStore
from swift_dist.data.samples.truncation import Sample
from swift_dist.data.templates.base import Encoded
from swift_dist.errors import JobError, RunError
from tests.data.samples.cases import job, make_store, numbered, sequence

PAD = 999


def open_data(
    stores: list[SampleStore],
    validation: list[SampleStore] | None = None,
    *,
    data: dict | None = None,
    train: dict | None = None,
    model: dict | None = None,
    rank: int = 0,
    size: int = 1,
    layout: Any = "packed",
    **more: Any,
) -> SampleData:
    sections = {"data": {"sequence_length": 64, "prefetch": 0, **(data or {})}}
    sections["train"] = {"global_batch_size": 8, **({"epochs": 1} if train is None else train)}
    config = job(**sections, model=model or {})
    return SampleData(
        stores,
        validation or [],
        config,
        sample_kind=stores[0].kind,
        dp_rank=rank,
        dp_size=size,
        layout=layout,
        pad_id=PAD,
        **more,
    )


def samples_of(micro_batch: dict[str, torch.Tensor]) -> list[int]:
    """Numbers of the samples of a micro-batch made of `numbered` stores, without those that only fill it up."""
    real = micro_batch["sample_weights"].repeat_interleave(
        len(micro_batch["lengths"]) // len(micro_batch["sample_weights"])
    )
    tokens, segments = micro_batch["tokens"].flatten(), micro_batch["segments"].flatten()
    firsts = [int(tokens[segments == k][0]) for k in range(len(micro_batch["lengths"]))]
    return [token for token, weight in zip(firsts, real.tolist(), strict=True) if weight]


def numbers(batches: Iterable[list[dict[str, torch.Tensor]]]) -> list[int]:
    return [number for batch in batches for micro in batch for number in samples_of(micro)]


def reference(sequences: list[Encoded], layout: str, multiple: int) -> dict[str, list]:
    """Row by row and token by token."""
    rows: list[list[tuple]] = [[]] if layout == "packed" else []
    for number, encoded in enumerate(sequences):
        ids, weights = encoded.ids.tolist(), encoded.weights.tolist()
        row = rows[0] if layout == "packed" else []
        for t, token in enumerate(ids):
            is_last = t == len(ids) - 1
            row.append((token, -100 if is_last else ids[t + 1], 0.0 if is_last else weights[t + 1], t, number, 1))
        if layout == "padded":
            rows.append(row)
    width = -(-max(map(len, rows)) // multiple) * multiple
    for row in rows:
        padding = width - len(row)
        row += [(PAD, -100, 0.0, t if layout == "packed" else 0, -1, 0) for t in range(padding)]
    names = ["tokens", "labels", "weights", "position_ids", "segments", "attention_mask"]
    return {name: [[entry[k] for entry in row] for row in rows] for k, name in enumerate(names)}


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("kind", ["single", "pair"])
def test_tensors(tmp_path: Path, layout: str, multiple: int, kind: Any) -> None:
    lengths = [5, 1, 9, 3, 4, 7, 2, 6]
    pairs = [(sequence(n, first=100 * k), sequence(n + 2, first=100 * k + 50)) for k, n in enumerate(lengths)]
    held = [pair if kind == "pair" else pair[:1] for pair in pairs]
    store = make_store(tmp_path / "s", [Sample(sequences) for sequences in held], kind=kind)
    loader = open_data([store], train={"micro_batch_size": 4, "epochs": 1}, layout=layout, pad_to_multiple=multiple)
    seen = []
    for micro in loader.micro_batches(0):
        order = [token // 100 for token in samples_of(micro)[:: len(held[0])]]
        seen += order
        expected = reference([s for k in order for s in held[k]], layout, multiple)
        if layout == "packed":
            del expected["attention_mask"]
        for name, rows in expected.items():
            assert micro[name].tolist() == rows, name
            assert micro[name].dtype == (torch.float32 if name == "weights" else torch.int64)
        assert micro["lengths"].tolist() == [len(s) for k in order for s in held[k]]
        assert micro["sample_weights"].tolist() == [1.0] * 4
        width = len(held[0])
        assert micro["numbers"].tolist() == [width * k + place for k in order for place in range(width)]
        assert set(micro) == {*expected, "lengths", "sample_weights", "numbers"}
    assert sorted(seen) == list(range(8))


@pytest.mark.parametrize("split", [0.0, 0.25])
@pytest.mark.parametrize("size", [1, 2])
def test_samples_are_found_again_by_their_numbers(tmp_path: Path, size: int, split: float) -> None:
    """Of a job's steps and of its evaluation, over several stores: the numbers of a micro-batch lead to its tokens."""

    def pairs(count: int, first: int) -> list[Sample]:
        return [Sample((sequence(3, 10 * k), sequence(4, 10 * k + 5))) for k in range(first, first + count)]

    made = {"a": pairs(6, 0), "b": pairs(7, 6), "c": pairs(0 if split else 5, 13)}
    stores = [make_store(tmp_path / name, samples, kind="pair") for name, samples in made.items()]
    arguments: dict[str, Any] = {"data": {"split_ratio": split} if split else {}, "train": {"epochs": 2}}
    ranks = [
        open_data(stores[:2], [] if split else stores[2:], rank=rank, size=size, **arguments) for rank in range(size)
    ]

    def content(batches: Iterable[dict[str, torch.Tensor]]) -> dict[int, list[int]]:
        """number -> tokens"""
        found = {}
        for micro in batches:
            for place, number in enumerate(micro["numbers"].tolist()):
                if number >= 0:
                    found[number] = micro["tokens"][micro["segments"] == place].tolist()
        return found

    def merged(parts: Iterable[dict[int, list[int]]]) -> dict[int, list[int]]:
        return {number: tokens for part in parts for number, tokens in part.items()}

    training = [merged(content(rank.micro_batches(step)) for rank in ranks) for step in range(ranks[0].num_steps or 0)]
    evaluated = [merged(content(batch) for batch in rank.validation_batches()) for rank in ranks]
    seen = merged([*training, *evaluated])
    numbers = ranks[0].numbers_used(range(len(training)), None)
    assert sorted(seen) == sorted([*numbers.tolist(), *(numbers + 1).tolist()])
    assert len(seen) == ranks[0].num_sequences == 2 * sum(map(len, made.values()))
    assert merged(content(rank.batches_of(numbers.tolist())) for rank in ranks) == seen
    for step, content_of in enumerate(training):
        these = ranks[0].numbers_used(range(step, step + 1), 0)
        assert sorted(content_of) == sorted([*these.tolist(), *(these + 1).tolist()])
    assert (
        ranks[0].first_numbers
        == np.cumsum([0, *(2 * len(store) for store in made.values())]).tolist()[: 3 if split else 4]
    )


@pytest.mark.parametrize("how", [{}, {"packing": True}, {"group_by_length": True}])
def test_every_row_once_an_epoch_over_a_resume_with_other_ranks_at_any_step(tmp_path: Path, how: dict) -> None:
    lengths = np.random.default_rng(0).integers(2, 65, 101).tolist()
    store = numbered(tmp_path / "s", lengths)

    def run(step: int, size: int, micro: int) -> list[int]:
        seen = []
        for rank in range(size):
            loader = open_data([store], data=how, rank=rank, size=size, train={"micro_batch_size": micro, "epochs": 2})
            seen += [number for batch in loader.micro_batches(step) for number in samples_of(batch)]
        return sorted(seen)

    steps = open_data([store], data=how, train={"epochs": 2}).num_steps
    assert steps is not None and steps == open_data([store], data=how).steps_for(2)
    by_step = {key: [run(step, *key) for step in range(steps)] for key in ((4, 1), (2, 2), (2, 1), (1, 8))}
    first = by_step[4, 1]
    assert all(same == first for same in by_step.values())
    assert Counter(number for step in first for number in step) == dict.fromkeys(range(101), 2)


def test_micro_batches_are_dealt_out_as_in_pretraining(tmp_path: Path) -> None:
    """Sample b of micro-batch m of rank r is item s GBS + m MBS DP + r MBS + b."""
    store = numbered(tmp_path / "s", [3] * 40)
    whole = open_data([store], train={"micro_batch_size": 8, "epochs": 1})
    order = [number for step in range(5) for number in samples_of(whole.micro_batches(step)[0])]
    for rank in range(2):
        loader = open_data([store], rank=rank, size=2, train={"micro_batch_size": 2, "epochs": 1})
        for step in range(5):
            for m, micro in enumerate(loader.micro_batches(step)):
                start = step * 8 + m * 4 + rank * 2
                assert samples_of(micro) == order[start : start + 2]


@pytest.mark.parametrize("kind", ["single", "pair"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_last_batch_is_filled_up_alike_on_all_ranks(tmp_path: Path, layout: str, kind: Any) -> None:
    number = 1 if kind == "single" else 2
    store = make_store(tmp_path / "s", [Sample((sequence(4),) * number) for _ in range(11)], kind=kind)
    loaders = [
        open_data([store], rank=rank, size=2, layout=layout, train={"micro_batch_size": 2, "epochs": 1})
        for rank in range(2)
    ]
    assert loaders[0].num_steps == 2
    batches = [loader.micro_batches(1) for loader in loaders]
    # 3 samples for 2 ranks x 2: one round; the second would be empty on both.
    assert [[micro["sample_weights"].tolist() for micro in batch] for batch in batches] == [[[1, 1]], [[1, 0]]]
    micro = batches[1][0]
    fill = micro["segments"] >= number
    assert fill.any() and (micro["weights"][fill] == 0).all() and (micro["tokens"][fill] == PAD).all()
    assert micro["lengths"].tolist() == [4] * number + [2] * number
    if layout == "padded":
        assert micro["attention_mask"].sum(1).tolist() == [4] * number + [2] * number
    with pytest.raises(RunError, match="epochs hold 2 steps, step 3 was asked for"):
        loaders[0].micro_batches(2)


def test_packs_fill_rows_and_count_their_samples(tmp_path: Path) -> None:
    lengths = np.random.default_rng(1).integers(2, 30, 400).tolist()
    store = numbered(tmp_path / "s", lengths)
    loader = open_data([store], data={"packing": True}, train={"epochs": 1})
    rows = [micro for step in range(loader.num_steps or 0) for micro in loader.micro_batches(step)]
    real = [micro for micro in rows if micro["sample_weights"][0]]
    assert all(micro["tokens"].shape[1] <= 64 for micro in rows)
    assert sum(lengths) / (64 * len(real)) > 0.98
    assert all(len(micro["sample_weights"]) == len(micro["lengths"]) for micro in rows)
    assert max(len(micro["lengths"]) for micro in real) > 2
    padded = open_data([store], data={"packing": True}, layout="padded").micro_batches(0)
    assert all(len(micro["tokens"]) == len(micro["lengths"]) for micro in padded)  # a row each: nothing is mixed
    with pytest.raises(JobError, match=r"data\.group_by_length"):
        open_data([store], data={"packing": True, "group_by_length": True})


def test_grouping_saves_padding(tmp_path: Path) -> None:
    lengths = np.random.default_rng(2).integers(2, 65, 400).tolist()
    store = numbered(tmp_path / "s", lengths)

    def padded(how: dict) -> int:
        loader = open_data([store], data=how, layout="padded", train={"micro_batch_size": 4, "epochs": 1})
        return sum(micro["tokens"].numel() for step in range(50) for micro in loader.micro_batches(step))

    assert padded({"group_by_length": True}) < 1.1 * sum(lengths) < 1.3 * sum(lengths) < padded({})


def test_split_is_disjoint_and_the_same_for_every_run(tmp_path: Path) -> None:
    lengths = [2 + k for k in range(40)]
    store = numbered(tmp_path / "s", lengths)

    def run(seed: int, size: int = 1) -> tuple[list[int], list[int]]:
        train, held_out = [], []
        for rank in range(size):
            given = {"epochs": 1, "seed": seed}
            loader = open_data([store], data={"split_ratio": 0.1}, train=given, rank=rank, size=size)
            train += numbers(loader.micro_batches(step) for step in range(loader.num_steps or 0))
            held_out += numbers(loader.validation_batches())
        return train, held_out

    train, held_out = run(1)
    assert len(held_out) == 4 and sorted(train + held_out) == list(range(40))
    again, same = run(2, size=2)
    assert sorted(same) == sorted(held_out) and again != train
    # The same rows in another order, and another one among them: at most one changes its side.
    order = np.random.default_rng(0).permutation(40)
    samples = [Sample(tuple(store.sequences(k))) for k in order.tolist()] + [Sample((sequence(60, first=100),))]
    other = open_data([make_store(tmp_path / "other", samples)], data={"split_ratio": 0.1})
    assert len(set(held_out) - set(numbers(other.validation_batches()))) <= 1
    with pytest.raises(JobError, match=r"data\.split_ratio.*not one sample"):
        open_data([store], data={"split_ratio": 0.001})
    with pytest.raises(JobError, match=r"data\.split_ratio.*data\.validation is given"):
        open_data([store], [store], data={"split_ratio": 0.1})


def test_rows_that_occur_twice_stay_on_one_side(tmp_path: Path) -> None:
    samples = [Sample((sequence(5, first=k // 2),)) for k in range(60)]
    loader = open_data([make_store(tmp_path / "s", samples)], data={"split_ratio": 0.2})
    held_out = Counter(numbers(loader.validation_batches()))
    assert set(held_out.values()) == {2} and len(held_out) == 6


def test_validation_counts_every_sample_once(tmp_path: Path) -> None:
    store, validation = numbered(tmp_path / "s", [3] * 9), numbered(tmp_path / "v", [4] * 19)
    loaders = [open_data([store], [validation], rank=rank, size=2) for rank in range(2)]

    def seen(count: int | None) -> list[int]:
        return sorted(numbers(batch for loader in loaders for batch in loader.validation_batches(count)))

    by_seed = [open_data([store], [validation], train={"seed": seed}) for seed in (1, 2)]
    assert len({tuple(numbers(loader.validation_batches(1))) for loader in by_seed}) == 1
    assert seen(None) == seen(99) == list(range(19)) and len(seen(1)) == 8
    assert [len(batch) for batch in loaders[0].validation_batches()] == [4, 4, 2]
    with pytest.raises(JobError, match=r"data\.validation.*no dataset given"):
        open_data([store]).validation_batches(1)
    with pytest.raises(JobError, match=r"data\.validation.*has a share"):
        open_data([store], [SampleStore(validation.path, weight=2.0)])


@pytest.mark.parametrize(
    ("labels", "model", "dtype", "expected"),
    [
        ([1, 0, 1], {}, torch.int64, [1, 0, 1]),
        ([1, 0, 1], {"num_labels": 1}, torch.float32, [1.0, 0.0, 1.0]),
        ([0.5, 2, 1.0], {}, torch.float32, [0.5, 2.0, 1.0]),
        ([[1], [], [0, 2]], {"num_labels": 3}, torch.bool, [[False, True, False], [False] * 3, [True, False, True]]),
        ([[1.0, 2.0], [3.0, 0.5], [0.0, 0.0]], {"num_labels": 2}, torch.float32, [[1, 2], [3, 0.5], [0, 0]]),
    ],
)
def test_labels_of_sequences(tmp_path: Path, labels: list, model: dict, dtype: torch.dtype, expected: list) -> None:
    samples = [Sample((sequence(k + 2),), label) for k, label in enumerate(labels)]
    store = make_store(tmp_path / "s", samples, kind="classification")
    loader = open_data([store], layout="padded", train={"micro_batch_size": 4, "epochs": 1}, model=model)
    (micro,) = loader.micro_batches(0)
    found = micro["sequence_labels"]
    assert found.dtype == dtype and len(found) == 4
    assert [found[row].tolist() for row in range(3)] == [expected[int(n) - 2] for n in micro["lengths"][:3]]
    assert not found[3].any()  # it only fills the batch up
    given = open_data(
        [store],
        train={"epochs": 1, "micro_batch_size": 4},
        make_labels=lambda labels: torch.tensor([x is None for x in labels]),
    )
    assert given.micro_batches(0)[0]["sequence_labels"].tolist() == [False, False, False, True]


def test_classes_without_their_number_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [Sample((sequence(3),), [0, 1])], kind="classification")
    with pytest.raises(JobError, match=r"model\.num_labels"):
        open_data([store])


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_labels_of_tokens_stand_at_their_tokens(tmp_path: Path, layout: str) -> None:
    words = Sample((Encoded(np.array([7, 8, 9], np.int32), np.array([1, 0, 1], np.float32)),), [4, 5])
    store = make_store(tmp_path / "s", [words], kind="token_classification")
    (micro,) = open_data([store], layout=layout).micro_batches(0)
    assert micro["labels"].tolist() == [[4, -100, 5]] and micro["weights"].tolist() == [[1, 0, 1]]
    assert "sequence_labels" not in micro


def test_the_mismatched_answers_of_kto_are_apart(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [Sample((sequence(3), sequence(4)), 1)], kind="kto")
    (micro,) = open_data([store], train={"micro_batch_size": 2, "epochs": 1}).micro_batches(0)
    for prefix, length, number in (("", 3, 0), ("mismatched.", 4, 1)):
        assert micro[f"{prefix}sequence_labels"].tolist() == [1, 0] and micro[f"{prefix}lengths"][0] == length
        assert micro[f"{prefix}sample_weights"].tolist() == [1, 0]
        assert micro[f"{prefix}numbers"].tolist() == [number, -1]


@pytest.mark.parametrize(
    ("entries", "key"),
    [
        ([{"weight": 1}, {}], "data.train.*others have not"),
        ([{"weight": 1}, {"epochs": 1}], "data.train.*others have not"),
        ([{"weight": 1}, {"weight": 1e-300}], "data.train.*no sample beside"),
        ([{"epochs": 0.01}, {"epochs": 1}], r"data.train.*0.01 epochs of a's 5 samples are none"),
    ],
)
def test_shares_that_cannot_be(tmp_path: Path, entries: list[dict], key: str) -> None:
    stores = [numbered(tmp_path / name, [3] * 5, **entry) for name, entry in zip("ab", entries, strict=True)]
    with pytest.raises(JobError, match=key):
        open_data(stores)


def test_epochs_of_datasets_and_of_the_job(tmp_path: Path) -> None:
    stores = [numbered(tmp_path / "a", [3] * 8, epochs=2), numbered(tmp_path / "b", [3] * 8, epochs=1)]
    assert open_data(stores, train={"steps": 3}).num_steps == 3
    assert open_data(stores, train={"epochs": 2}).num_steps == 6
    with pytest.raises(JobError, match=r"train\.steps: 4, but the epochs of data\.train hold 3"):
        open_data(stores, train={"steps": 4})


def test_without_epochs_there_is_no_end(tmp_path: Path) -> None:
    loader = open_data([numbered(tmp_path / "a", [3] * 5)], train={"steps": 1000})
    assert loader.num_steps is None and sum(m["sample_weights"].sum() for m in loader.micro_batches(999)) == 8


def test_ranks_that_cannot_share_a_global_batch(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"train\.global_batch_size.*multiple of micro_batch_size 1 x 3"):
        open_data([numbered(tmp_path / "a", [3] * 5)], size=3)


def test_samples_travel_as_plain_values(tmp_path: Path) -> None:
    store, validation = numbered(tmp_path / "s", [3, 4] * 8, epochs=2.0), numbered(tmp_path / "v", [5] * 8)
    values = json.loads(json.dumps(stores_as_values([store], [validation])))
    config = job(data={"sequence_length": 64, "prefetch": 0}, train={"global_batch_size": 8, "epochs": 1})
    opened = open_samples(values, config, dp_rank=0, dp_size=1, layout="packed", pad_id=PAD)
    here = open_data([store], [validation])
    assert opened.fingerprint() == here.fingerprint() and opened.num_steps == here.num_steps == 4
    assert numbers([opened.micro_batches(3)]) == numbers([here.micro_batches(3)])
    assert numbers(opened.validation_batches()) == numbers(here.validation_batches())
    (tmp_path / "v" / "tokens.bin").unlink()
    with pytest.raises(RunError, match=r"encoded rows cannot be read.*tokens\.bin is missing"):
        open_samples(values, config, dp_rank=0, dp_size=1, layout="packed", pad_id=PAD)


def test_prefetched_batches_are_the_same(tmp_path: Path) -> None:
    store = numbered(tmp_path / "a", [3, 4, 5] * 10)
    plain, ahead = open_data([store]), open_data([store], data={"prefetch": 3})
    try:
        for step in (0, 1, 2, 1, 2, 3):
            for a, b in zip(plain.micro_batches(step), ahead.micro_batches(step), strict=True):
                assert all(torch.equal(a[name], b[name]) for name in a)
        assert ahead.wait_seconds >= 0
    finally:
        ahead.close()


def test_the_fingerprint_is_of_content_and_shares(tmp_path: Path) -> None:
    a, b = numbered(tmp_path / "a", [3, 4]), numbered(tmp_path / "b", [3, 4])
    assert open_data([a]).fingerprint() == open_data([b]).fingerprint()
    assert open_data([a]).fingerprint() != open_data([numbered(tmp_path / "c", [3, 5])]).fingerprint()
    assert open_data([a]).fingerprint() != open_data([SampleStore(a.path, epochs=2.0)]).fingerprint()
