"""Memory that is used step after step: of weights and caches in large pages (Linux), of results kept when it is free.

Of pages of 4 KiB a processor remembers the places of a few MiB; those of the others it has to look up. Knows neither.
"""

import ctypes
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

__all__ = ["free_memory", "keep_freed", "lasting", "zeros"]

#: Bytes that are taken from the system at once; what is less than the smallest part of it stays in the heap.
_CHUNK, _LEAST = 64 << 20, 256 << 10
_LINE = 64
#: Parameters of mallopt (malloc.h), and bytes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _KEPT = -1, -3, 1 << 30

_lock = Lock()
_chunk: mmap.mmap | None = None
_used = 0


def lasting(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `torch.empty` on the CPU, unfilled; its memory goes when all that was taken with it has gone."""
    size = prod(shape) * dtype.itemsize
    if size < _LEAST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(*shape, dtype=dtype)
    memory, begin = _taken(size)
    return torch.frombuffer(memory, dtype=dtype, count=prod(shape), offset=begin).view(*shape)


def _taken(size: int) -> tuple[mmap.mmap, int]:
    """So many bytes of a chunk, and where they begin. What is large has one of its own."""
    global _chunk, _used
    if size > _CHUNK // 4:
        return zeros(size), 0
    with _lock:
        if _chunk is None or _used + size > len(_chunk):
            _chunk, _used = zeros(_CHUNK), 0
        begin, _used = _used, -(-(_used + size) // _LINE) * _LINE
        return _chunk, begin


def zeros(size: int) -> mmap.mmap:
    """So many bytes, at least one; none takes memory before it or its neighbours in a page are touched."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system may be built without
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on the device, what torch keeps there for later among them."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(meminfo["MemAvailable"].split()[0]) * 1024


def keep_freed() -> None:
    """Let this process keep freed memory, up to a GiB, rather than give it back to the system (glibc's malloc).

    A step's large results else come as new pages each time, which the system has to find and clear: a third of the time
    of a long prompt's products. Nothing happens where malloc knows no such settings.
    """
    settle = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if settle is not None:
        settle(_MMAP_THRESHOLD, _KEPT)
        settle(_TRIM_THRESHOLD, _KEPT)
