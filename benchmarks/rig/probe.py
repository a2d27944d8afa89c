"""Print, as JSON, the best sequential read (GB/s) and matrix product (GFLOP/s) of N threads: probe.py N [ask].

With `ask` it answers each line of its input with the best read of that moment.
"""

import json
import sys
import time
from collections.abc import Callable

import torch

SIZE_BYTES = 512 * 2**20
SIDE, TRIAL_SIDE = 2048, 256


def best_s(work: Callable[[], object], times: int) -> float:
    """The shortest of several runs."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def read_gb_s(threads: int) -> float:
    """By the project's own probe where it is installed, else a sum of float32, the fastest read that torch has."""
    try:
        from bestiary_kernels.measure import read_bandwidth
    except ImportError:
        buffer = torch.ones(SIZE_BYTES // 4)
        return SIZE_BYTES / best_s(buffer.sum, 12) / 1e9
    bytes_per_s: float = read_bandwidth(threads)
    return bytes_per_s / 1e9


def product_gflop_s() -> float:
    """Of bfloat16, or where the processor has no instructions for it and torch's product takes forever, of float32."""

    def rate(dtype: torch.dtype, side: int) -> float:
        square = torch.randn(side, side).to(dtype)
        return 2 * side**3 / best_s(lambda: square @ square, 6) / 1e9

    return rate(max((torch.bfloat16, torch.float32), key=lambda dtype: rate(dtype, TRIAL_SIDE)), SIDE)


def main() -> None:
    """Measure and print."""
    threads = int(sys.argv[1])
    torch.set_num_threads(threads)
    if sys.argv[2:] == ["ask"]:
        for _ in sys.stdin:
            print(read_gb_s(threads), flush=True)
        return
    print(json.dumps({"read_gb_s": read_gb_s(threads), "product_gflop_s": product_gflop_s()}))


if __name__ == "__main__":
    main()
