"""A folder's safetensors files as one checkpoint, read through memory maps. Knows nothing of what the tensors are for.

Everything is checked when a checkpoint is opened; afterwards a tensor is a view of the mapped file. A file that
somebody shortens while it is mapped is beyond us: the kernel answers a read past its new end with SIGBUS, and the
process ends.
Torch is imported with the first tensor, so that names, shapes and sizes can be looked up without it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

from bestiary.checkpoint.header import Entry, read_header
from bestiary.checkpoint.jsonfile import read_object, shown
from bestiary.errors import CheckpointMalformed, CheckpointNotFound

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Checkpoint"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_INDEX_LIMIT_BYTES = 100_000_000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Checkpoint:
    """The tensors of a folder by name, in the order in which they lie in the files.

    Open one with `Checkpoint.open`. Tensors are private views of the mapped files: they are meant to be read, and a
    write to one would not reach the file.
    """

    def __init__(self, folder: Path, files: dict[Path, dict[str, Entry]], maps: dict[Path, mmap.mmap]) -> None:
        self.folder = folder
        self._maps = maps
        self._found: dict[str, tuple[Path, Entry]] = {}
        for file, entries in files.items():
            for name, entry in entries.items():
                if name in self._found:
                    both = f"{self._found[name][0].name} and {file.name}"
                    raise CheckpointMalformed(
                        f"{folder}: tensor {shown(name)} is in both {both}; keep one copy of the model in a folder"
                    )
                self._found[name] = (file, entry)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Map and check the weights of a folder.

        They are `model.safetensors`, or the shards that `model.safetensors.index.json` lists, or else every
        `*.safetensors` there is. Raises CheckpointNotFound where there are none, and CheckpointMalformed, naming file
        and tensor, where a file is not what it claims to be.
        """
        try:
            index = _read_index(folder)
            opened = {file: _open_file(file) for file in _files(folder, index)}
        except OSError as error:
            where = error.filename or folder
            raise CheckpointNotFound(f"{where} cannot be read ({error.strerror}); check its permissions") from error
        for name, shard in index.items():
            if name not in opened[folder / shard][0]:
                raise CheckpointMalformed(
                    f"{folder / _INDEX} says that tensor {shown(name)} is in {shard}, which does not hold it; "
                    "download both again"
                )
        entries = {file: found for file, (found, _) in opened.items()}
        return cls(folder, entries, {file: mapped for file, (_, mapped) in opened.items()})

    @classmethod
    def single(cls, file: Path) -> Self:
        """One safetensors file. Raises as `open` does."""
        try:
            entries, mapped = _open_file(file)
        except OSError as error:
            raise CheckpointNotFound(f"{file} cannot be read ({error.strerror}); check its permissions") from error
        return cls(file.parent, {file: entries}, {file: mapped})

    def adopt(self, other: Checkpoint, prefix: str, within: str = "") -> None:
        """Take in another checkpoint's tensors behind the prefix `within`, which then stand behind `prefix`.

        Of a tensor that both have, this one's own counts. The other's files are let go with this one's.
        """
        for name, found in other._found.items():
            if name.startswith(within):
                self._found.setdefault(prefix + name.removeprefix(within), found)
        self._maps.update(other._maps)

    def names(self) -> list[str]:
        """Every tensor's name, in file order."""
        return list(self._found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, name: object) -> bool:
        return name in self._found

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.end - entry.begin for _, entry in self._found.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's sizes. Raises KeyError for a name that is not in the checkpoint, as all methods here do."""
        return self._found[name][1].shape

    def dtype(self, name: str) -> str:
        """The tensor's dtype in torch's words, as config.json writes it too: "bfloat16"."""
        return self._found[name][1].dtype

    def file(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self._found[name][0]

    def tensor(self, name: str) -> Tensor:
        """A view of the tensor's bytes in the mapped file, without a copy.

        Only a tensor that lies at an address its dtype cannot be read from (the format permits it) is copied. The view
        stays valid after `release` and `close`. Raises ValueError when the checkpoint is closed.
        """
        import torch

        file, entry = self._found[name]
        dtype = getattr(torch, entry.dtype)
        if file not in self._maps:
            raise ValueError(f"the checkpoint in {self.folder} is closed; read tensors before that")
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        count = entry.end - entry.begin
        data = torch.frombuffer(self._maps[file], dtype=torch.uint8, count=count, offset=entry.begin)
        if data.data_ptr() % dtype.itemsize:
            data = data.clone()
        return data.view(dtype).view(entry.shape)

    def release(self, name: str) -> None:
        """Let the tensor's pages go from memory, after it was copied; a view of it reads them from the file again."""
        file, entry = self._found[name]
        if file in self._maps and entry.begin < entry.end:
            start = entry.begin - entry.begin % mmap.PAGESIZE
            self._maps[file].madvise(mmap.MADV_DONTNEED, start, entry.end - start)

    def close(self) -> None:
        """Let the files go. A file whose tensors are still held stays mapped until the last of them is dropped."""
        # Not mmap.close(): it would unmap the pages under the tensors that still read them.
        self._maps.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _files(folder: Path, index: dict[str, str]) -> list[Path]:
    if index:
        return [folder / shard for shard in sorted(set(index.values()))]
    return [folder / _SINGLE] if (folder / _SINGLE).exists() else _loose_files(folder)


def _open_file(file: Path) -> tuple[dict[str, Entry], mmap.mmap]:
    # Asked first, because opening a FIFO would wait for its writer.
    if not file.is_file():
        what = "is not a file" if file.exists() else "is missing"
        raise CheckpointMalformed(f"{file} {what}; the checkpoint is incomplete: download it again")
    with file.open("rb") as stream:
        size_bytes = os.fstat(stream.fileno()).st_size
        entries = read_header(stream, size_bytes, file)
        # A private map may be written to as far as Python is concerned, which is what torch asks of a buffer.
        mapped = mmap.mmap(stream.fileno(), size_bytes, access=mmap.ACCESS_COPY)
    mapped.madvise(mmap.MADV_SEQUENTIAL)
    return entries, mapped


def _read_index(folder: Path) -> dict[str, str]:
    """The map from tensor to shard, each the plain name of a safetensors file; empty where no index is followed."""
    index = folder / _INDEX
    if (folder / _SINGLE).exists() or not index.exists():
        return {}
    shards = read_object(index, _INDEX_LIMIT_BYTES).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointMalformed(f"{index} has no weight_map from tensors to files; download it again")
    for name, shard in shards.items():
        plain = isinstance(shard, str) and shard.isprintable() and not set(shard) & {"/", "\\"}
        if not plain or not shard.endswith(".safetensors"):
            raise CheckpointMalformed(
                f"{index} puts tensor {shown(name)} into {shown(shard)}, which is not the plain name of a safetensors "
                "file; download it again"
            )
    return shards


def _loose_files(folder: Path) -> list[Path]:
    """Every safetensors file of a folder that follows no naming; an error that says what to do where there is none."""
    if not folder.is_dir():
        raise CheckpointNotFound(f"{folder} is not a folder; give the folder that holds config.json and the weights")
    if files := sorted(folder.glob("*.safetensors")):
        return files
    if pickles := sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern)):
        raise CheckpointNotFound(
            f"{folder} has its weights as pickle files only ({', '.join(pickles[:3])}). A pickle can run any code "
            "while it is read, so Bestiary never reads one. Take a safetensors revision of the model, if its hub has "
            "one, or convert it where you trust it: with transformers, AutoModelForCausalLM.from_pretrained(FOLDER)"
            ".save_pretrained(NEW_FOLDER, safe_serialization=True)."
        )
    raise CheckpointNotFound(f"{folder} holds no *.safetensors file; download the model's weights into it")
