"""The machine's floors that benchmarks compare with: bytes read per second, multiply-adds done per second.

Knows nothing of the operations that are compared with them.
"""

import time
from collections.abc import Callable

import torch

from bestiary_kernels import library

__all__ = ["matmul_flops", "read_bandwidth"]


def read_bandwidth(threads: int | None = None, *, size_bytes: int = 256 * 2**20, repeats: int = 5) -> float:
    """Bytes per second of a sequential read by `threads` threads (torch's count when None): the best of `repeats`.

    `size_bytes` must be far above the last cache level. Without the C++ library torch's sum of int32 is measured,
    which is bound by its additions on some machines and then says too little.
    """
    memory = torch.zeros(size_bytes // 4096 * 1024, dtype=torch.int32)
    kernels = library.active()
    threads = threads or torch.get_num_threads()
    best_s = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        if kernels is None:
            memory.sum(dtype=torch.int32)
        else:
            kernels.read_memory(memory.data_ptr(), memory.nbytes, threads)
        best_s = min(best_s, time.perf_counter() - start)
    return memory.nbytes / best_s


def matmul_flops(
    dtype: torch.dtype, *, size: int = 1024, repeats: int = 5, device: torch.device | str = "cpu"
) -> float:
    """Floating-point operations per second of torch's product of two square matrices: the best of `repeats`."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    synchronise: Callable[[], object] = torch.cuda.synchronize if a.is_cuda else lambda: None
    best_s = float("inf")
    for _ in range(repeats + 1):  # one more: the first warms caches and packs
        synchronise()
        start = time.perf_counter()
        a @ b
        synchronise()
        best_s = min(best_s, time.perf_counter() - start)
    return 2.0 * size**3 / best_s
