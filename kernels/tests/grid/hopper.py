"""Compile for Hopper what the cases launch, on no GPU: `python -m kernels.tests.grid.hopper [DRAWS] [NAME ...]`.

The kernels do not run, so the results are rubbish and only the compiler's complaints count. Triton's interpreter knows
no types of branches and no layouts: what it runs need not compile.
"""

import os
import random
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bestiary_kernels import gpu

from . import CASES
from .draw import Seeded

__all__ = ["main"]


class Absent:
    """What Triton asks a GPU's driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def main(draws: int, names: list[str]) -> None:
    """Say how many launches of each case were compiled. Raises what the compiler raises."""
    assert os.environ.get(gpu.INTERPRETED) != "1", "interpreted kernels cannot be compiled"
    driver.set_active(Absent())
    run, compiled = JITFunction.run, 0

    def compile_only(self: Any, *arguments: Any, warmup: bool, **options: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return run(self, *arguments, warmup=True, **options)

    JITFunction.run = compile_only
    gpu._on_cpu = True
    for name in names or CASES:
        before = compiled
        for seed in range(draws):
            try:
                CASES[name](Seeded(random.Random(seed)), torch.device("cpu"))
            except AssertionError:
                continue  # the result
        print(f"{name}: {compiled - before} compiled", flush=True)


if __name__ == "__main__":
    main(int((sys.argv[1:] or ["5"])[0]), sys.argv[2:])
