"""What the host writes and recorded kernels read, in memory that stays where it is. Knows no meaning of it."""

import ctypes
from typing import Any

import torch
from torch import Tensor

__all__ = ["HostMemory", "bytes_of"]


def bytes_of(tensor: Tensor) -> memoryview:
    """The host's memory behind a dense tensor, which the view does not keep."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


class HostMemory:
    """Numbers that the host writes and kernels read: on a CPU in one place, on a GPU in a copy that `send` brings."""

    def __init__(self, words: int, device: torch.device) -> None:
        self._host = torch.zeros(words, dtype=torch.int64, pin_memory=device.type != "cpu")
        self._there = self._host if device.type == "cpu" else self._host.to(device)
        self._memory = bytes_of(self._host)
        self._used = 0
        self._sent = None if device.type == "cpu" else torch.cuda.Event()  # type: ignore[no-untyped-call]

    def take(self, count: int, dtype: torch.dtype) -> tuple[memoryview, Tensor]:
        """So many numbers, as the host writes them, and as kernels read them."""
        begin, end = self._used, self._used + count * dtype.itemsize
        self._used = -(-end // 8) * 8
        code: Any = {torch.int64: "q", torch.int32: "i", torch.bool: "?"}[dtype]
        return self._memory[begin:end].cast(code), self._there.view(torch.uint8)[begin:end].view(dtype)

    def wait(self) -> None:
        """Until what was sent last has left: before that it must not be written over."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self) -> None:
        """Let kernels that are launched from now on see what was written."""
        if self._sent is not None:
            self._there.copy_(self._host, non_blocking=True)
            self._sent.record()
