"""Stores: what is written comes back, and damage is noticed."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from swift_dist.data.samples.store import DamagedStoreError, SampleStore, check_labels, check_vocabulary
from swift_dist.data.samples.truncation import Sample
from swift_dist.errors import JobError
from tests.data.samples.cases import make_store, numbered, sequence


def assert_holds(store: SampleStore, samples: list[Sample]) -> None:
    assert store.num_samples == len(samples)
    for number, sample in enumerate(samples):
        found = store.sequences(number)
        assert len(found) == len(sample.sequences)
        for a, b in zip(found, sample.sequences, strict=True):
            assert np.array_equal(a.ids, b.ids) and np.array_equal(a.weights, b.weights)
            assert a.ids.dtype == np.int32 and a.weights.dtype == np.float32
        assert store.label(number) == sample.label
    lengths = [sum(len(sequence) for sequence in sample.sequences) for sample in samples]
    assert store.lengths.tolist() == lengths and store.num_tokens == sum(lengths)


def test_single_samples_of_whole_weights(tmp_path: Path) -> None:
    samples = [Sample((sequence(length, first=100 * length),)) for length in (3, 1, 7)]
    store = make_store(tmp_path / "s", samples)
    assert_holds(store, samples)
    assert (tmp_path / "s" / "weights.bin").stat().st_size == 11  # a byte each
    assert not store.has_labels and store.max_token_id == 706
    assert store.facts["learning_tokens"] == sum(int(s.sequences[0].weights.sum()) for s in samples)


@pytest.mark.parametrize("labels", [[1, 0, 3], [0.25, -1.0, 2.0], [[1, 2], [], [0]], [[0.5], [1.5], [2.0]]])
def test_pairs_of_any_weights_with_labels(tmp_path: Path, labels: list) -> None:
    samples = [Sample((sequence(4, weights=[0, 0.5, 2, 1]), sequence(k + 2)), label) for k, label in enumerate(labels)]
    store = make_store(tmp_path / "s", samples, kind="kto")
    assert_holds(store, samples)
    again = pickle.loads(pickle.dumps(store))
    assert_holds(again, samples)
    assert isinstance(store.label(0), type(labels[0]))


def test_labels_of_two_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"data\.train.*several kinds: list, scalar"):
        make_store(tmp_path / "s", [Sample((sequence(3),), 1), Sample((sequence(3),), [1])], kind="classification")


@pytest.mark.parametrize(
    "name", ["tokens.bin", "weights.bin", "ends.bin", "hashes.bin", "bad_rows.jsonl", "store.json"]
)
def test_what_is_missing_or_cut_off_is_noticed_when_opened(tmp_path: Path, name: str) -> None:
    numbered(tmp_path / "s", [5, 6, 7])
    file = tmp_path / "s" / name
    if file.stat().st_size:
        file.write_bytes(file.read_bytes()[:-1] if name != "store.json" else b"{")
        with pytest.raises(DamagedStoreError, match=name):
            SampleStore(tmp_path / "s")
    file.unlink()
    with pytest.raises(DamagedStoreError, match=name):
        SampleStore(tmp_path / "s")


def test_a_changed_byte_is_noticed_when_verified(tmp_path: Path) -> None:
    numbered(tmp_path / "s", [5, 6, 7])
    file = tmp_path / "s" / "tokens.bin"
    data = bytearray(file.read_bytes())
    data[9] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedStoreError, match=r"tokens\.bin is not what was written"):
        SampleStore(tmp_path / "s", verify=True)


def test_another_format_is_refused(tmp_path: Path) -> None:
    numbered(tmp_path / "s", [5])
    header = tmp_path / "s" / "store.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), "format": 99}))
    with pytest.raises(DamagedStoreError, match="format 99"):
        SampleStore(tmp_path / "s")


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    store = numbered(tmp_path / "a", [5, 6, 7])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert SampleStore(tmp_path / "b").fingerprint() == store.fingerprint()
    assert numbered(tmp_path / "c", [5, 6, 8]).fingerprint() != store.fingerprint()


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    store = numbered(tmp_path / "a", [5, 6, 7])
    check_vocabulary([store], 3)
    with pytest.raises(JobError, match="has token 2, the model's vocabulary has 2"):
        check_vocabulary([store], 2)


def labelled(folder: Path, labels: list, kind: str = "classification") -> SampleStore:
    return make_store(folder, [Sample((sequence(3),), label) for label in labels], kind=kind)


@pytest.mark.parametrize(
    ("labels", "num_labels", "problem_type", "says"),
    [
        ([0, 3], 3, None, "has class 3, but the model has 3 outputs, for classes 0 to 2"),
        ([[0], [1, 5]], 3, None, "has class 5"),
        ([[0], []], 1, None, "the model has 1 outputs"),
        ([0.5, 1.0], 3, None, "model.num_labels: 3, but each row of .* has one number"),
        ([0, 1], 3, "regression", "model.num_labels: 3"),
        ([0, 1], 3, "multi_label_classification", "model.problem_type: multi_label_classification, but .* a class"),
        ([[0], [1]], 3, "single_label_classification", "model.problem_type: single_label.* a list of classes"),
        ([0, 1], 1, "single_label_classification", "model.problem_type: single_label.* a number"),
    ],
)
def test_labels_that_the_head_has_no_output_for(
    tmp_path: Path, labels: list, num_labels: int, problem_type: str | None, says: str
) -> None:
    with pytest.raises(JobError, match=says):
        check_labels([labelled(tmp_path / "s", labels)], num_labels, problem_type)


@pytest.mark.parametrize(
    ("labels", "num_labels", "problem_type"),
    [
        ([0, 2], 3, None),
        ([0, 2], 3, "single_label_classification"),
        ([7, 100], 1, None),
        ([0.5, 3.0], 1, "regression"),
        ([[0, 2], []], 3, "multi_label_classification"),
    ],
)
def test_labels_that_fit_the_head(tmp_path: Path, labels: list, num_labels: int, problem_type: str | None) -> None:
    check_labels([labelled(tmp_path / "s", labels)], num_labels, problem_type)
