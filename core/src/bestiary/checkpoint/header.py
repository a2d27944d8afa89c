"""The header of one safetensors file: what is stored where. Knows nothing of torch, and reads no tensor.

    [8 bytes: n, little endian][n bytes: JSON][tensor data, without holes, to the end of the file]

The JSON maps a tensor's name to its dtype, its shape and the half-open range of bytes that it takes in the data.
Everything is checked here, so that whoever reads an entry's bytes cannot read beyond the file.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bestiary.checkpoint.jsonfile import parse_object, shown
from bestiary.errors import CheckpointMalformed

__all__ = ["Entry", "read_header"]

#: The format's own limit; a header of 100 MB describes about a million tensors.
_HEADER_LIMIT_BYTES = 100_000_000

#: The format's name of a dtype -> (torch's name of it, bytes per element).
_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}

#: Torch counts elements and strides in 64 signed bits, and iterates over at most 64 dimensions.
_MAX_ELEMENTS = 2**63 - 1
_MAX_DIMENSIONS = 64

_AGAIN = "the file is damaged or incomplete: download it again"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file. `dtype` is torch's word for it; `begin` and `end` are offsets in the file, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(stream: BinaryIO, size_bytes: int, file: Path) -> dict[str, Entry]:
    """Return the entries of a file of `size_bytes`, opened at its start, in the order of their data.

    Raises CheckpointMalformed, naming `file` and where possible the tensor, for a header that does not describe exactly
    the bytes that follow it.
    """
    start = stream.read(8)
    if len(start) < 8:
        raise CheckpointMalformed(f"{file} has {size_bytes} bytes, fewer than the start of a header; {_AGAIN}")
    (length,) = struct.unpack("<Q", start)
    if not 2 <= length <= min(_HEADER_LIMIT_BYTES, size_bytes - 8):
        raise CheckpointMalformed(_bad_length(start, length, size_bytes, file))
    header = parse_object(stream.read(length), f"{file}: its header")
    _check_metadata(header.pop("__metadata__", None), file)
    entries = _entries(header, 8 + length, file)
    in_order = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_cover(in_order, 8 + length, size_bytes, file)
    return in_order


def _bad_length(start: bytes, length: int, size_bytes: int, file: Path) -> str:
    if start == b"version ":
        return (
            f"{file} is a Git LFS pointer in place of the weights; run `git lfs pull` there, or download the file again"
        )
    return f"{file} says that its header has {length} bytes, which a file of {size_bytes} bytes cannot; {_AGAIN}"


def _check_metadata(metadata: Any, file: Path) -> None:
    fits = metadata is None or (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values()))
    if not fits:
        raise CheckpointMalformed(f"{file}: __metadata__ must map strings to strings; {_AGAIN}")


def _entries(header: dict[str, Any], data_start: int, file: Path) -> dict[str, Entry]:
    entries = {}
    for name, value in header.items():
        try:
            if not _is_unicode(name):
                raise ValueError("has a name that is no text")
            entries[name] = _entry(value, data_start)
        except ValueError as fault:
            raise CheckpointMalformed(f"{file}: tensor {shown(name)} {fault}; {_AGAIN}") from fault
    return entries


def _entry(value: Any, data_start: int) -> Entry:
    """Check one tensor's description by itself and return it with offsets in the file. Raises ValueError."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("must have a dtype, a shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"has the dtype {shown(dtype)}, and this version reads {', '.join(_DTYPES)}")
    if not _is_shape(shape):
        raise ValueError(f"has the shape {shown(shape)}, which no tensor can have")
    if not _is_naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"has the data_offsets {shown(offsets)}, which are no range")
    torch_dtype, width = _DTYPES[dtype]
    begin, end = offsets
    if end - begin != math.prod(shape) * width:
        raise ValueError(f"takes {math.prod(shape) * width} bytes as {dtype} {shape}, its data_offsets are {offsets}")
    return Entry(torch_dtype, tuple(shape), data_start + begin, data_start + end)


def _check_cover(entries: dict[str, Entry], data_start: int, size_bytes: int, file: Path) -> None:
    """Every byte of the data belongs to exactly one tensor, and every tensor ends within the file."""
    position = data_start
    for name, entry in entries.items():
        if entry.begin != position:
            what = "overlaps the one before it" if entry.begin < position else "begins after a hole"
            raise CheckpointMalformed(f"{file}: tensor {shown(name)} {what}; {_AGAIN}")
        position = entry.end
        if position > size_bytes:
            ends = f"needs the file to have {position} bytes, but it ends after {size_bytes}"
            raise CheckpointMalformed(f"{file}: tensor {shown(name)} {ends}; {_AGAIN}")
    if position != size_bytes:
        raise CheckpointMalformed(f"{file} has {size_bytes - position} bytes that belong to no tensor; {_AGAIN}")


def _is_unicode(name: str) -> bool:
    # JSON can spell half a surrogate pair, which can be neither printed nor written.
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def _is_naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _MAX_ELEMENTS for n in value)


def _is_shape(value: Any) -> bool:
    # A zero makes the tensor empty, but torch still multiplies the other sizes into strides.
    return (
        _is_naturals(value) and len(value) <= _MAX_DIMENSIONS and math.prod(max(n, 1) for n in value) <= _MAX_ELEMENTS
    )
