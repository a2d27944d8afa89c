"""The GGUF container: typed metadata and dequantised tensors. Knows no architecture and no tokenizer.

The header is parsed here, with every length checked against the file before it is believed; the `gguf` package
knows how the quantised blocks are laid out.

    magic "GGUF" | version u32 | tensors u64 | keys u64 | key-value pairs | tensor infos | padding | tensor data
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Self, TypeVar

import torch

from bestiary.errors import CapabilityMissing, CheckpointMalformed, CheckpointNotFound

__all__ = ["GGUFFile"]

T = TypeVar("T")

VERSIONS = (2, 3)
MAX_DIMS = 4
STRING, ARRAY, FLOAT32 = 8, 9, 6
# struct's letter for each scalar kind of metadata, by the number that stands in the file.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", FLOAT32: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class _Tensor:
    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # torch order: the last dimension is contiguous
    offset: int  # bytes, from the start of the file
    row_bytes: int
    rows: int


class GGUFFile:
    """One GGUF file, mapped into memory: `metadata`, tensor names and shapes, and tensors as float32."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self._data = data
        reader = _Reader(path, data)
        tensors, keys = reader.start()
        metadata = {}
        for _ in range(keys):
            key, value = reader.pair()
            if key in metadata:
                raise reader.malformed(f"the key {key!r} stands twice")
            metadata[key] = value
        self.metadata: Mapping[str, Any] = MappingProxyType(metadata)
        alignment = self.get("general.alignment", int, 32)
        if alignment < 1 or alignment & (alignment - 1):
            raise reader.malformed(f"general.alignment is {alignment}, not a power of two")
        self._tensors = reader.tensors(tensors, alignment)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a GGUF file for reading.

        Raises CheckpointNotFound where there is no such file, CheckpointMalformed where it is not a whole GGUF file,
        and CapabilityMissing where the `gguf` package is not installed.
        """
        _gguf()
        try:
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise CheckpointMalformed(f"{path}: the file is empty; fetch it again") from None
        except OSError as error:
            raise CheckpointNotFound(f"{path}: cannot be read ({error.strerror}); install or fetch it again") from error
        return cls(path, data)

    def get(self, key: str, kind: type[T], default: T) -> T:
        """Return a metadata value, or `default` where the file does not have the key; raises as `need` does."""
        return self.need(key, kind) if key in self.metadata else default

    def need(self, key: str, kind: type[T]) -> T:
        """Return a metadata value; raises CheckpointMalformed if it is missing or not of type `kind`."""
        if key not in self.metadata:
            raise CheckpointMalformed(f"{self.path}: the metadata has no {key!r}; convert the model again")
        value = self.metadata[key]
        if type(value) is not kind:
            raise CheckpointMalformed(
                f"{self.path}: the metadata's {key!r} should be of type {kind.__name__}, not {type(value).__name__}"
            )
        return value

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, in the order of the file."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape in torch's order, the contiguous dimension last."""
        return self._tensor(name).shape

    def dequantised(self, name: str) -> torch.Tensor:
        """Return a tensor's values as float32, in memory of its own."""
        tensor = self._tensor(name)
        gguf = _gguf()
        import numpy as np  # gguf brings it; nothing else in core needs it

        stored = np.frombuffer(self._data, np.uint8, tensor.rows * tensor.row_bytes, tensor.offset)
        try:
            with np.errstate(all="ignore"):  # an infinite scale gives what it gives
                values = gguf.dequantize(stored.reshape(tensor.rows, tensor.row_bytes), tensor.kind)
        except NotImplementedError:
            raise CapabilityMissing(
                f"{self.path}: {name!r} is stored as {tensor.kind.name}, which gguf {_version()} cannot dequantise; "
                "take a file in another quantisation, or a newer gguf"
            ) from None
        own = np.require(values, np.float32, ["C", "W"])  # copied only where it still is the file's memory
        return torch.from_numpy(own).reshape(tensor.shape)

    def _tensor(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise CheckpointMalformed(f"{self.path}: there is no tensor {name!r}; convert the model again")
        return self._tensors[name]


class _Reader:
    """A cursor over the header; every step checks that the file goes on that far."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 0

    def malformed(self, what: str) -> CheckpointMalformed:
        return CheckpointMalformed(f"{self.path}: not a usable GGUF file: {what} (byte {self.at}); fetch it again")

    def start(self) -> tuple[int, int]:
        """Read magic and version; return how many tensors and key-value pairs follow."""
        if self.bytes(4) != b"GGUF":
            raise self.malformed("it does not begin with GGUF")
        version = self.scalar("I")
        if version not in VERSIONS:
            raise self.malformed(f"its version is {version}, and versions {VERSIONS} in little endian are known")
        return self.scalar("Q"), self.scalar("Q")

    def expect(self, size: int) -> None:
        """Raise where the file does not go on for `size` bytes."""
        if size > len(self.data) - self.at:
            raise self.malformed(f"{size} bytes should follow, and it ends")

    def bytes(self, size: int) -> bytes:
        self.expect(size)
        self.at += size
        return self.data[self.at - size : self.at]

    def scalars(self, letter: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{letter}", self.bytes(count * struct.calcsize("<" + letter)))

    def scalar(self, letter: str) -> Any:
        return self.scalars(letter, 1)[0]

    def string(self) -> str:
        raw = self.bytes(self.scalar("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.malformed("a text is not UTF-8") from None

    def pair(self) -> tuple[str, Any]:
        key, kind = self.string(), self.scalar("I")
        if kind == ARRAY:
            return key, self.array()
        if kind == STRING:
            return key, self.string()
        value = self.scalar(self.letter(kind))
        return key, _shortest(value) if kind == FLOAT32 else value

    def array(self) -> list[Any]:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind != STRING:
            return list(self.scalars(self.letter(kind), count))
        self.expect(8 * count)  # every text has at least its length: no absurd count is looped over
        return [self.string() for _ in range(count)]

    def letter(self, kind: int) -> str:
        if kind not in SCALARS:
            raise self.malformed(f"a value is of the unknown kind {kind}")
        return SCALARS[kind]

    def tensors(self, count: int, alignment: int) -> dict[str, _Tensor]:
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name, dims = self.string(), self.scalar("I")
            if name in infos or not 0 < dims <= MAX_DIMS:
                raise self.malformed(f"the tensor {name!r} stands twice, or has {dims} dimensions")
            infos[name] = tuple(reversed(self.scalars("Q", dims))), self.scalar("I"), self.scalar("Q")
        start = -(-self.at // alignment) * alignment
        return {name: self.tensor(name, shape, kind, start + at) for name, (shape, kind, at) in infos.items()}

    def tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> _Tensor:
        gguf = _gguf()
        try:
            known = gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise self.malformed(f"the tensor {name!r} is of the unknown kind {kind}") from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[known]
        if 0 in shape or shape[-1] % block:
            raise self.malformed(f"the tensor {name!r} is {known.name}, {block} values a block, and shaped {shape}")
        tensor = _Tensor(known, shape, offset, shape[-1] // block * block_bytes, prod(shape[:-1]))
        if offset + tensor.rows * tensor.row_bytes > len(self.data):
            raise self.malformed(f"the tensor {name!r} reaches beyond its {len(self.data)} bytes")
        return tensor


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, where its exact value is 9.999999747378752e-06."""
    if value != value or value in (float("inf"), float("-inf")):
        return value
    texts = (f"{value:.{digits}g}" for digits in range(6, 10))
    return next(float(text) for text in texts if struct.unpack("<f", struct.pack("<f", float(text)))[0] == value)


def _gguf() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise CapabilityMissing("reading GGUF needs the gguf package: pip install 'bestiary[gguf]'") from None
    return gguf


def _version() -> str:
    from importlib_metadata import version

    return version("gguf")
