"""What torch.save wrote, read without torch and without running anything that a file names.

An archive of torch.save is a zip file: ``<name>/data.pkl`` is a pickle of the object in which tensors are references to
records ``<name>/data/<key>``, stored uncompressed. The pickle is loaded with every name in it that is not a plain
Python container replaced by an inert `Placeholder`, which keeps what it was called with and does nothing. Format:
torch/serialization.py (`_save`) and torch/_utils.py (`_rebuild_tensor_v2`, `_v3`).
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from swift_dist.converters.mapping import Box, box_size
from swift_dist.converters.stored import BY_TORCH, ITEM_SIZES, Extent, StoredTensor

_PLAIN = {
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    *(("builtins", name) for name in ("set", "frozenset", "bytearray", "complex", "dict", "list", "tuple", "int")),
}
_STORAGES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}
_LOCAL_HEADER = 30  # bytes before a record's name in its local header (APPNOTE.TXT 4.3.7)
_DESCRIPTOR = 0x08  # flag of a record: sizes and checksum follow its content (4.3.9)


class Placeholder:
    """Stands for a class or function that a pickle names; see `name_of`, `args`, `state`, `items`."""

    qualified = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        made = super().__new__(cls)
        made.args = args
        made.state = None
        made.items = {}
        made.elements = []
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    args: tuple[Any, ...]
    state: Any
    items: dict[Any, Any]
    elements: list[Any]

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        self.elements.append(value)

    def extend(self, values: Any) -> None:
        self.elements.extend(values)

    def add(self, value: Any) -> None:
        self.elements.append(value)


def name_of(value: Any) -> str:
    """``module.name`` of what a placeholder (or its class) stands for; "" for anything else."""
    return str(getattr(value, "qualified", ""))


def fields_of(value: Any) -> dict[str, Any]:
    """The attributes of an object that was pickled by its ``__dict__`` (and ``__slots__``)."""
    state = getattr(value, "state", None)
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
        return {**(state[0] or {}), **state[1]}
    return dict(state) if isinstance(state, dict) else {}


class InertUnpickler(pickle.Unpickler):
    """Builds plain containers, and `Placeholder`s for all else."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream, encoding="utf-8")
        self._made: dict[tuple[str, str], type[Placeholder]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return super().find_class(module, name)
        if (module, name) == ("copyreg", "_reconstructor"):
            return _reconstructed
        key = (module, name)
        if key not in self._made:
            self._made[key] = type(name, (Placeholder,), {"qualified": f"{module}.{name}"})
        return self._made[key]

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _reconstructed(cls: Any, *_: Any) -> Any:
    """What protocol 0 and 1 pickles make objects with."""
    return cls()


def load_inert(stream: BinaryIO) -> Any:
    """Load a pickle without running anything.

    Raises:
        ValueError: it is truncated or no pickle.
    """
    try:
        return InertUnpickler(stream).load()
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        TypeError,
        LookupError,
        ArithmeticError,
        MemoryError,
    ) as error:
        raise ValueError(f"no readable pickle ({type(error).__name__}: {error})") from None


@dataclass(frozen=True)
class TensorRef:
    """A tensor in an archive: which record, and how it lies there."""

    record: str
    dtype: str
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        expected = 1
        for extent, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if extent != 1 and step != expected:
                return False
            expected *= extent
        return True


def tensor_ref(value: Any) -> TensorRef | None:
    """The tensor that a placeholder of an archive's pickle stands for; None: it is something else.

    Raises:
        ValueError: it is described as torch describes none.
    """
    try:
        return _tensor_ref(value)
    except (AttributeError, TypeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"a tensor is described as none should be ({type(error).__name__}: {error})") from None


def _tensor_ref(value: Any) -> TensorRef | None:
    name = name_of(value)
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return tensor_ref(value.args[0])
    if name not in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
        return None
    (kind, storage, record, _, _), start, shape, stride = value.args[:4]
    if kind != "storage":
        raise ValueError(f"a tensor lies in a {kind!r}, which is not known")
    storage_name = name_of(storage).rpartition(".")[2]
    if name.endswith("_v3"):
        dtype = BY_TORCH.get(name_of(value.args[6]).rpartition(".")[2], "")
    else:
        dtype = _STORAGES.get(storage_name, "")
    if not dtype:
        raise ValueError(f"a tensor is stored as {storage_name}, which is not known")
    return TensorRef(str(record), dtype, int(start), tuple(map(int, shape)), tuple(map(int, stride)))


class Archive:
    """An archive of torch.save in a buffer (a mapped file, or a part of one).

    Attributes:
        content: the saved object with placeholders.

    Raises:
        ValueError: it is not one, or not whole.
    """

    def __init__(self, data: Any, offset: int = 0, length: int | None = None) -> None:
        whole = memoryview(data)
        self._offset = offset
        self._data = whole[offset : offset + (len(whole) - offset if length is None else length)]
        if length is not None and len(self._data) != length:
            raise ValueError(f"{length} bytes are expected from byte {offset} on, there are {len(self._data)}")
        try:
            self._zip = zipfile.ZipFile(_View(self._data))  # type: ignore[arg-type]
            names = self._zip.namelist()
            self._starts = sorted(each.header_offset for each in self._zip.infolist())
            pickled = next(name for name in names if name.endswith("/data.pkl"))
            self._prefix = pickled.removesuffix("data.pkl")
            self.content = load_inert(io.BytesIO(self._record(pickled)))
            order = f"{self._prefix}byteorder"
            little = order not in names or self._record(order) == b"little"
        except (zipfile.BadZipFile, StopIteration, NotImplementedError, OSError) as error:
            raise ValueError(f"not a whole file of torch.save ({error or 'no data.pkl'})") from None
        if not little:
            raise ValueError("it was written on a big-endian machine")

    @property
    def begins_at_once(self) -> bool:
        """Whether nothing stands before the first record."""
        return self._starts[0] == 0

    def place(self, ref: TensorRef) -> int:
        """Byte of the buffer at which a tensor's values begin.

        Raises:
            ValueError: it is not in the archive, or not whole, or not in one piece.
        """
        if not ref.contiguous:
            raise ValueError(f"a tensor of shape {list(ref.shape)} has strides {list(ref.stride)}: save it contiguous")
        begin, size = self._find(f"{self._prefix}data/{ref.record}")
        item = ITEM_SIZES[ref.dtype]
        if (ref.start + box_size(tuple((0, extent) for extent in ref.shape))) * item > size:
            raise ValueError(f"record {ref.record} is shorter than its tensor")
        return self._offset + begin + ref.start * item

    def _find(self, name: str) -> tuple[int, int]:
        """(first byte, length) of a record in the archive."""
        try:
            record = self._zip.getinfo(name)
        except KeyError:
            raise ValueError(f"{name} is missing") from None
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        header = self._data[record.header_offset : record.header_offset + _LOCAL_HEADER]
        if bytes(header[:4]) != b"PK\x03\x04":
            raise ValueError(f"{name} has no header")
        name_length, extra_length = struct.unpack("<HH", bytes(header[26:30]).ljust(4, b"\0"))
        extra = record.header_offset + _LOCAL_HEADER + name_length
        begin = extra + extra_length
        encoded = record.orig_filename.encode("utf-8" if record.flag_bits & 0x800 else "cp437")
        # Nothing else would notice a damaged length: the values would be read some bytes too early or too late.
        if self._data[extra - name_length : extra] != encoded or not _is_extra(bytes(self._data[extra:begin])):
            raise ValueError(f"{name} has a damaged header")
        end = begin + record.file_size
        following = self._starts[bisect_right(self._starts, record.header_offset) :][:1]
        limit = min([self._zip.start_dir, *following])
        if record.flag_bits & _DESCRIPTOR and self._data[end : end + 4] == b"PK\x07\x08":
            limit = min(limit, end)
        if end != limit:
            raise ValueError(f"{name} is not whole")
        return begin, record.file_size

    def _record(self, name: str) -> bytes:
        """A small record's bytes. Its checksum, where the writer left it out, is 0."""
        begin, size = self._find(name)
        content, checksum = bytes(self._data[begin : begin + size]), self._zip.getinfo(name).CRC
        if checksum and zlib.crc32(content) != checksum:
            raise ValueError(f"{name} does not have its checksum")
        return content

    def stored(self, name: str, ref: TensorRef, file: str) -> StoredTensor:
        box: Box = tuple((0, extent) for extent in ref.shape)
        return StoredTensor(name, ref.shape, ref.dtype, (Extent(file, self.place(ref), box),))


def _is_extra(field: bytes) -> bool:
    """Whether bytes are the extra field of a header (APPNOTE.TXT 4.5): blocks of id, length and content, or padding."""
    while len(field) >= 4:
        length = 4 + int.from_bytes(field[2:4], "little")
        if length > len(field):
            return False
        field = field[length:]
    return not any(field)


class _View(io.RawIOBase):
    """A buffer as a file, without a copy of it."""

    def __init__(self, data: memoryview) -> None:
        self._view, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._at, len(self._view))[whence]
        if base + offset < 0:
            raise OSError(22, "before the beginning of the file")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        stop = len(self._view) if size is None or size < 0 else self._at + size
        found = bytes(self._view[self._at : stop])
        self._at += len(found)
        return found


def find_archived(data: Any, offset: int, length: int, shape: tuple[int, ...], dtype: str) -> int:
    """Byte at which the values of the one tensor of an archive begin.

    Raises:
        ValueError: the archive is damaged, or holds something else than a tensor of this shape and dtype.
    """
    archive = Archive(data, offset, length)
    if not archive.begins_at_once:
        raise ValueError("holds something before the tensor: its index leads to another one's place")
    ref = tensor_ref(archive.content)
    if ref is None:
        raise ValueError("holds no tensor")
    if (ref.shape, ref.dtype) != (shape, dtype):
        raise ValueError(f"holds {ref.dtype} {list(ref.shape)}; its index says {dtype} {list(shape)}")
    return archive.place(ref)


def tensors_in(content: Any, prefix: str = "") -> dict[str, TensorRef]:
    """All tensors of a state dict by their dotted names.

    Raises:
        ValueError: it holds an object that is no tensor: leaving it out might leave out a weight.
    """
    found: dict[str, TensorRef] = {}
    if isinstance(content, Mapping):
        for key, value in content.items():
            found |= tensors_in(value, f"{prefix}.{key}" if prefix else str(key))
        return found
    ref = tensor_ref(content)
    if ref is None and (found_name := name_of(content)):
        raise ValueError(f"{prefix or 'it'} is a {found_name}, which is not read as a tensor")
    return {prefix: ref} if ref is not None else {}
