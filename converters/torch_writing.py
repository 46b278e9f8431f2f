"""What torch.save would write, laid out without torch and without values: the mirror image of `torch_files`.

Importing torch takes longer than planning the conversion of most models, so the little of its format that is needed is
written here: a pickle in which tensors refer to records, in a zip file whose records are stored uncompressed and begin
at multiples of 64 bytes. Formats: torch/serialization.py (`_save`), torch/_utils.py (`_rebuild_tensor_v2`),
caffe2/serialize/inline_container.cc (records and their alignment), PKWARE's APPNOTE.TXT 4.3 (zip).

torch itself reads such files when the checksums of the values are absent (`torch.serialization.skip_data` writes them
so), because its reader never looks at checksums.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import struct
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from swift_dist.converters.stored import ITEM_SIZES

_STORAGES = {"F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage"}
_ALIGNMENT = 64
_NAME = "archive"
_LIMIT = 0xFFFFFFFF  # what does not fit in 32 bits stands in an extra field (zip64)


class Named:
    """Something that a pickle refers to by its name, without it being imported here."""

    qualified = ""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.state is not None:
            return copyreg.__newobj__, (type(self),), self.state  # type: ignore[attr-defined]
        return type(self), self.args


@cache
def named(qualified: str) -> type[Named]:
    """The class or function ``module.name``."""
    return type(qualified.rpartition(".")[2], (Named,), {"qualified": qualified})


def called(qualified: str, *args: Any) -> Named:
    """What ``module.name(*args)`` returns."""
    return named(qualified)(*args)


def built(qualified: str, state: Any) -> Named:
    """An object of a class with a state: its ``__dict__``, or what its ``__setstate__`` takes."""
    made = named(qualified)()
    made.state = state
    return made


class NamePickler(pickle._Pickler):  # the C pickler insists on importing what it names
    """Pickles plain Python values and `Named` ones."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        qualified = getattr(obj, "qualified", "")
        if not qualified:
            super().save_global(obj, name)  # type: ignore[misc]
            return
        module, _, attribute = qualified.rpartition(".")
        self.write(pickle.GLOBAL + f"{module}\n{attribute}\n".encode())  # type: ignore[attr-defined]
        self.memoize(obj)  # type: ignore[attr-defined]


def pickled(value: Any) -> bytes:
    stream = io.BytesIO()
    NamePickler(stream, 2).dump(value)
    return stream.getvalue()


@dataclass(frozen=True)
class EmptyTensor:
    """A tensor whose values come later: floats, contiguous, on the CPU."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_elements(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    def __reduce_ex__(self, protocol: Any) -> Any:
        stride, step = [], 1
        for extent in reversed(self.shape):
            stride.append(step)
            step *= max(extent, 1)
        rebuild = named("torch._utils._rebuild_tensor_v2")
        return rebuild, (_Storage(self), 0, self.shape, tuple(reversed(stride)), False, OrderedDict())


@dataclass(frozen=True)
class _Storage:
    tensor: EmptyTensor


class _ArchivePickler(NamePickler):
    """Notes the storages that it meets, in order."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, 2)
        self.tensors: list[EmptyTensor] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        key = str(len(self.tensors))
        self.tensors.append(obj.tensor)
        kind = named(f"torch.{_STORAGES[obj.tensor.dtype]}")
        return ("storage", kind, key, "cpu", obj.tensor.num_elements)


@dataclass(frozen=True)
class ArchiveLayout:
    """An archive of torch.save.

    Args:
        size: of the whole archive, in bytes.
        literals: (offset, bytes) of all but the values.
        places: (offset, bytes) of each tensor's values, in the order in which the pickle meets them.
    """

    size: int
    literals: tuple[tuple[int, bytes], ...]
    places: tuple[tuple[int, int], ...]


def archive_layout(content: Any) -> ArchiveLayout:
    """Lay out what ``torch.save(content, ...)`` would write; its tensors are `EmptyTensor`s."""
    stream = io.BytesIO()
    pickler = _ArchivePickler(stream)
    pickler.dump(content)
    zipped = _Zip()
    zipped.add("data.pkl", stream.getvalue())
    zipped.add(".format_version", b"1")
    zipped.add(".storage_alignment", str(_ALIGNMENT).encode())
    zipped.add("byteorder", b"little")
    places = []
    for number, tensor in enumerate(pickler.tensors):
        size = tensor.num_elements * ITEM_SIZES[tensor.dtype]
        places.append((zipped.skip(f"data/{number}", size), size))
    zipped.add("version", b"3\n")
    return ArchiveLayout(*zipped.close(), places=tuple(places))


@lru_cache(maxsize=4096)
def tensor_layout(shape: tuple[int, ...], dtype: str) -> ArchiveLayout:
    """The archive of one tensor. All of a shape and dtype look alike."""
    return archive_layout(EmptyTensor(shape, dtype))


@dataclass(frozen=True)
class _Record:
    name: bytes
    crc: int
    size: int
    offset: int


class _Zip:
    """A zip file of stored records; the values of some are left out."""

    def __init__(self) -> None:
        self._at = 0
        self._runs: list[tuple[int, bytearray]] = []
        self._records: list[_Record] = []

    def add(self, name: str, content: bytes) -> None:
        self._begin(name, len(content), zlib.crc32(content))
        self._write(content)

    def skip(self, name: str, size: int) -> int:
        """A record whose values come later; returns where they begin."""
        self._begin(name, size, 0)
        begin = self._at
        self._at += size
        return begin

    def _begin(self, name: str, size: int, crc: int) -> None:
        encoded = f"{_NAME}/{name}".encode()
        self._records.append(_Record(encoded, crc, size, self._at))
        long = struct.pack("<HHQQ", 1, 16, size, size) if size >= _LIMIT else b""
        begin = self._at + 30 + len(encoded) + len(long) + 4  # of the values, with an empty padding field
        padding = struct.pack("<2sH", b"FB", -begin % _ALIGNMENT) + b"Z" * (-begin % _ALIGNMENT)
        short = min(size, _LIMIT)
        sizes = (crc, short, short, len(encoded), len(long) + len(padding))
        self._write(struct.pack("<IHHHHHIIIHH", 0x04034B50, 45 if long else 0, 0, 0, 0, 0, *sizes))
        self._write(encoded + long + padding)

    def _write(self, content: bytes) -> None:
        if not self._runs or self._runs[-1][0] + len(self._runs[-1][1]) != self._at:
            self._runs.append((self._at, bytearray()))
        self._runs[-1][1].extend(content)
        self._at += len(content)

    def close(self) -> tuple[int, tuple[tuple[int, bytes], ...]]:
        """Write the directory; returns (size of the file, literals)."""
        start = self._at
        for record in self._records:
            long = [record.size, record.size] if record.size >= _LIMIT else []
            long += [record.offset] if record.offset >= _LIMIT else []
            extra = struct.pack(f"<HH{len(long)}Q", 1, 8 * len(long), *long) if long else b""
            short = min(record.size, _LIMIT)
            head = (0x02014B50, 0, 45 if long else 0, 0, 0, 0, 0, record.crc, short, short, len(record.name))
            tail = (len(extra), 0, 0, 0, 0, min(record.offset, _LIMIT))
            self._write(struct.pack("<IHHHHHHIIIHHHHHII", *head, *tail) + record.name + extra)
        size, count, end = self._at - start, len(self._records), self._at
        if start >= _LIMIT or count >= 0xFFFF:
            self._write(struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, start))
            self._write(struct.pack("<IIQI", 0x07064B50, 0, end, 1))
        short_count = min(count, 0xFFFF)
        self._write(struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, short_count, short_count, size, min(start, _LIMIT), 0))
        return self._at, tuple((offset, bytes(content)) for offset, content in self._runs)
