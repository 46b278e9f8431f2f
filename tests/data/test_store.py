"""The reader against megatron's own, and against files that are not what they should be."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from swift_dist.data.store import TokenStore, token_dtype, write_index
from swift_dist.errors import JobError, RunError
from tests.data.megatron_files import build

DOCUMENTS = [[1, 2, 3], [], [7], list(range(100)), [], [65499]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_reads_what_megatron_reads(tmp_path: Path, dtype: type) -> None:
    prefix = build(tmp_path / "d", DOCUMENTS, dtype)
    reference = IndexedDataset(prefix)
    with TokenStore(prefix) as store:
        assert store.dtype == reference.index.dtype
        assert store.num_sequences == len(reference) == len(DOCUMENTS)
        np.testing.assert_array_equal(store.lengths(), reference.sequence_lengths)
        np.testing.assert_array_equal(store.pointers(), reference.index.sequence_pointers)
        np.testing.assert_array_equal(store.boundaries(), reference.document_indices)
        stream = np.concatenate([reference[i] for i in range(len(reference))])
        np.testing.assert_array_equal(store.read(0, store.num_tokens), stream)
        np.testing.assert_array_equal(store.read(5, 17), stream[5:22])


@pytest.mark.parametrize("chunk", [1, 2, 4, 1000])
def test_index_is_the_one_megatron_writes(tmp_path: Path, chunk: int) -> None:
    prefix = build(tmp_path / "d", DOCUMENTS)
    stream = io.BytesIO()
    write_index(stream, np.array([len(d) for d in DOCUMENTS], np.int32), np.uint16, chunk)
    assert stream.getvalue() == Path(f"{prefix}.idx").read_bytes()


def test_index_pointers_beyond_int32() -> None:
    """Byte offsets past 2^31 and 2^32: a sum kept in int32 would wrap."""
    lengths = np.full(5, 2**30, np.int32)
    stream = io.BytesIO()
    write_index(stream, lengths, np.int32, chunk=2)
    pointers = np.frombuffer(stream.getvalue(), "<i8", count=5, offset=34 + 20)
    assert pointers.tolist() == [k * 2**32 for k in range(5)]


def test_token_type_is_megatrons() -> None:
    from megatron.core.datasets.indexed_dataset import DType

    for size in (1, 65499, 65500, 65535, 65536, 200000):
        assert token_dtype(size) is DType.optimal_dtype(size)


def _cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def _poke(path: Path, offset: int, data: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(data)] = data
    path.write_bytes(bytes(raw))


DAMAGE = {
    "empty idx": (lambda p: _cut(p.with_suffix(".idx"), 0), ".idx"),
    "header cut": (lambda p: _cut(p.with_suffix(".idx"), 20), ".idx"),
    "idx cut": (lambda p: _cut(p.with_suffix(".idx"), -8), ".idx"),
    "magic": (lambda p: _poke(p.with_suffix(".idx"), 0, b"X"), ".idx"),
    "version": (lambda p: _poke(p.with_suffix(".idx"), 9, b"\x02"), ".idx"),
    "token type": (lambda p: _poke(p.with_suffix(".idx"), 17, b"\x63"), ".idx"),
    "float tokens": (lambda p: _poke(p.with_suffix(".idx"), 17, b"\x07"), ".idx"),
    "count": (lambda p: _poke(p.with_suffix(".idx"), 18, b"\xff"), ".idx"),
    "length": (lambda p: _poke(p.with_suffix(".idx"), 34, b"\x09"), ".idx"),
    "pointer": (lambda p: _poke(p.with_suffix(".idx"), 34 + 4 * len(DOCUMENTS) + 8 * 3, b"\x09"), ".idx"),
    "bin cut": (lambda p: _cut(p.with_suffix(".bin"), -2), ".bin"),
    "bin longer": (lambda p: p.with_suffix(".bin").open("ab").write(b"ab"), ".bin"),
    "no bin": (lambda p: p.with_suffix(".bin").unlink(), ".bin"),
    "no idx": (lambda p: p.with_suffix(".idx").unlink(), ".idx"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    prefix = tmp_path / "d"
    build(prefix, DOCUMENTS)
    harm, suffix = DAMAGE[name]
    harm(prefix)
    with pytest.raises(JobError) as caught:
        TokenStore(prefix, "data.validation")
    assert caught.value.key == "data.validation"
    assert f"{prefix}{suffix}" in caught.value.message
    assert caught.value.remedy


def test_a_file_that_shrinks_under_a_run(tmp_path: Path) -> None:
    prefix = build(tmp_path / "d", [list(range(1000))])
    with TokenStore(prefix) as store:
        _cut(Path(f"{prefix}.bin"), 100)
        with pytest.raises(RunError, match="became shorter"):
            store.read(0, 1000)


def test_content_hash_tells_datasets_apart(tmp_path: Path) -> None:
    def digest(name: str, documents: list[list[int]]) -> str:
        with TokenStore(build(tmp_path / name, documents)) as store:
            return store.content_hash()

    first = digest("a", [[1, 2], [3, 4]])
    assert digest("copy", [[1, 2], [3, 4]]) == first
    assert digest("tokens", [[1, 2], [3, 5]]) != first
    assert digest("documents", [[1, 2, 3], [4]]) != first


def test_a_prefix_that_is_none_lists_those_beside_it(tmp_path: Path) -> None:
    for name in ("a_train", "a_validation"):
        for suffix in ("bin", "idx"):
            (tmp_path / f"{name}.{suffix}").touch()
    for given, named in ((tmp_path / "a", 2), (tmp_path, 2), (tmp_path / "a_train.bin", 1)):
        with pytest.raises(JobError) as caught:
            TokenStore(given)
        assert str(tmp_path / "a_train") in str(caught.value.remedy)
        assert (str(tmp_path / "a_validation") in str(caught.value.remedy)) == (named == 2)
