"""Megatron's indexed token files, read and written: PREFIX.bin (tokens) and PREFIX.idx (where documents lie).

Layout of the .idx, little-endian (megatron.core.datasets.indexed_dataset, version 1)::

    9 bytes   magic "MMIDIDX\\0\\0"
    uint64    version, 1
    uint8     code of the token type
    uint64    S, number of sequences (one per document here)
    uint64    D, number of document boundaries (documents + 1)
    int32[S]  tokens in each sequence
    int64[S]  byte at which each sequence starts in the .bin
    int64[D]  sequence at which each document starts; the last one is S

The reader is our own because importing megatron's takes seconds and its memory map turns a file that shrinks under a
run into SIGBUS; the tests hold both against each other.
"""

from __future__ import annotations

import glob
import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from swift_dist.errors import JobError, RunError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, token type, sequences, document boundaries
TOKEN_TYPES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
CODES = {dtype: code for code, dtype in TOKEN_TYPES.items()}

_FULL_CHECK = 1 << 22  # sequences up to which every pointer is checked; beyond, this many in even blocks
_BLOCK = 1 << 16  # bytes of one block hashed by `content_hash`


def token_dtype(vocab_size: int) -> type[np.integer]:
    """The token type that Megatron chooses for a vocabulary: uint16 below 65,500 entries, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def write_index(stream: BinaryIO, lengths: np.ndarray, dtype: type[np.integer], chunk: int = 1 << 20) -> None:
    """Write the .idx of documents that follow each other in the .bin, one sequence each.

    Args:
        stream: the open .idx file.
        lengths: int32 [documents], tokens of each document in order; may be a memory map.
        dtype: token type of the .bin.
        chunk: documents handled at once (memory is bounded by it, not by the number of documents).
    """
    count, itemsize = len(lengths), np.dtype(dtype).itemsize
    stream.write(HEADER.pack(MAGIC, 1, CODES[dtype], count, count + 1))
    for start in range(0, count, chunk):
        stream.write(lengths[start : start + chunk].astype("<i4").tobytes())
    pointer = 0
    for start in range(0, count, chunk):
        sizes = lengths[start : start + chunk].astype(np.int64) * itemsize
        ends = pointer + np.cumsum(sizes, dtype=np.int64)
        stream.write((ends - sizes).astype("<i8").tobytes())
        pointer = int(ends[-1])
    for start in range(0, count + 1, chunk):
        stream.write(np.arange(start, min(start + chunk, count + 1), dtype="<i8").tobytes())


def _prefix_remedy(prefix: str) -> str:
    """What to give instead of a prefix that is none: its stem, those in the folder, or those that begin alike."""
    path = Path(prefix)
    if path.suffix in (".bin", ".idx"):
        return f"give the prefix, without {path.suffix}: {path.with_suffix('')}"
    beside = path.glob("*.idx") if path.is_dir() else path.parent.glob(f"{glob.escape(path.name)}_*.idx")
    found = [str(idx.with_suffix("")) for idx in sorted(beside) if bin_path(idx.with_suffix("")).is_file()]
    if found:
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        return f"there {'is' if len(found) == 1 else 'are'} {', '.join(found[:8])}{more}: give one of them"
    return "give the prefix that `swift-dist data prepare --output PREFIX` wrote (without .bin or .idx)"


class TokenStore:
    """Read access to one prepared dataset, checked when opened. Reads release the GIL and hold no memory map.

    Attributes:
        dtype: token type; num_tokens: tokens in the .bin; num_sequences, num_documents: as the .idx states them.

    Raises:
        JobError: a file is missing, or is not what its header or its partner says; names the file.
    """

    def __init__(self, prefix: str | Path, key: str = "data.train") -> None:
        self.prefix, self._key, self._fd = str(prefix), key, -1
        self.bin, self.idx = bin_path(prefix), idx_path(prefix)
        for path in (self.idx, self.bin):
            if not path.is_file():
                raise JobError(key, f"{path} does not exist", _prefix_remedy(self.prefix))
        self._read_header()
        self._check_pointers()
        self._fd = os.open(self.bin, os.O_RDONLY)

    def _bad(self, path: Path, why: str) -> JobError:
        return JobError(self._key, f"{path} is corrupt: {why}", "prepare the dataset again, or copy it again")

    def _read_header(self) -> None:
        with self.idx.open("rb") as stream:
            head = stream.read(HEADER.size)
        if len(head) < HEADER.size:
            raise self._bad(self.idx, f"{len(head)} bytes, shorter than its header of {HEADER.size}")
        magic, version, code, sequences, boundaries = HEADER.unpack(head)
        if magic != MAGIC:
            raise self._bad(self.idx, "it does not start with Megatron's magic bytes MMIDIDX")
        if version != 1:
            raise self._bad(self.idx, f"format version {version}, only 1 is known")
        if code not in TOKEN_TYPES:
            raise self._bad(self.idx, f"token type code {code} is none of {sorted(TOKEN_TYPES)}")
        size, plain = self.idx.stat().st_size, HEADER.size + 12 * sequences + 8 * boundaries
        if size not in (plain, plain + sequences):  # the latter: multimodal, one mode byte a sequence
            raise self._bad(self.idx, f"{size} bytes, but {sequences} sequences need {plain}")
        self.dtype = TOKEN_TYPES[code]
        self.itemsize = np.dtype(self.dtype).itemsize
        self.num_sequences, self.num_documents = int(sequences), int(boundaries) - 1

    def _map(self, dtype: str, count: int, offset: int) -> np.ndarray:
        if count == 0:
            return np.empty(0, dtype)
        return np.memmap(self.idx, dtype=dtype, mode="r", offset=offset, shape=(count,))

    def lengths(self) -> np.ndarray:
        """int32 [num_sequences], a memory map of the .idx: tokens of each sequence."""
        return self._map("<i4", self.num_sequences, HEADER.size)

    def pointers(self) -> np.ndarray:
        """int64 [num_sequences], a memory map of the .idx: first byte of each sequence in the .bin."""
        return self._map("<i8", self.num_sequences, HEADER.size + 4 * self.num_sequences)

    def boundaries(self) -> np.ndarray:
        """int64 [num_documents + 1], a memory map of the .idx: first sequence of each document."""
        return self._map("<i8", self.num_documents + 1, HEADER.size + 12 * self.num_sequences)

    def _check_pointers(self) -> None:
        """The sequences must fill the .bin without gaps: samples are cut from it as one stream of tokens."""
        size = self.bin.stat().st_size
        lengths, pointers, boundaries = self.lengths(), self.pointers(), self.boundaries()
        if self.num_documents < 0 or boundaries[0] != 0 or boundaries[-1] != self.num_sequences:
            raise self._bad(self.idx, "its document boundaries do not run from 0 to the number of sequences")
        described = 0
        if self.num_sequences:
            described = int(pointers[-1]) + int(lengths[-1]) * self.itemsize
        if described != size:
            raise self._bad(self.bin, f"{size} bytes, but its .idx describes {described}")
        for block in self._blocks_to_check():
            size_in_bytes = lengths[block].astype(np.int64) * self.itemsize
            starts = pointers[block]
            if (size_in_bytes < 0).any() or (starts[1:] - starts[:-1] != size_in_bytes[:-1]).any():
                raise self._bad(self.idx, "its sequences do not follow each other in the .bin")
        if self.num_sequences and pointers[0] != 0:
            raise self._bad(self.idx, f"its first sequence starts at byte {pointers[0]}, not 0")
        self.num_tokens = size // self.itemsize

    def _blocks_to_check(self) -> Iterator[slice]:
        count, step = self.num_sequences, 1 << 16
        stride = step if count <= _FULL_CHECK else count // (_FULL_CHECK // step)
        for start in range(0, count, stride):
            yield slice(start, min(start + step + 1, count))

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the whole stream, in the file's own type.

        Raises:
            RunError: the file cannot be read or has become shorter.
        """
        wanted, offset, parts = count * self.itemsize, start * self.itemsize, []
        try:
            while wanted:
                part = os.pread(self._fd, wanted, offset)
                if not part:
                    raise RunError(
                        f"{self.bin} became shorter while it was read", "restore the file and resume the run"
                    )
                parts.append(part)
                wanted, offset = wanted - len(part), offset + len(part)
        except OSError as error:
            raise RunError(f"cannot read {self.bin}: {error}") from error
        return np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), dtype=self.dtype)

    def content_hash(self, blocks: int = 64) -> str:
        """sha256 over both sizes, the .idx (up to 64 MiB whole, else in blocks) and evenly spaced blocks of the .bin.

        Bounded work whatever the corpus: it tells datasets apart, it does not prove that every byte is unharmed (the
        manifest's hashes do).
        """
        digest = hashlib.sha256()
        for path, count in ((self.idx, 1024), (self.bin, blocks)):
            size = path.stat().st_size
            digest.update(struct.pack("<Q", size))
            with path.open("rb") as stream:
                num_blocks = -(-size // _BLOCK)
                chosen = (
                    range(num_blocks) if num_blocks <= count else np.linspace(0, num_blocks - 1, count, dtype=np.int64)
                )
                for block in chosen:
                    stream.seek(int(block) * _BLOCK)
                    digest.update(stream.read(_BLOCK))
        return digest.hexdigest()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> TokenStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
