"""Compile what the rows launch: `python -m kernels.tests.compiled [--arch 90] [OPERATION ...]`.

Needs Triton's compiler and no GPU. TRITON_INTERPRET may not be set: then there would be nothing to compile.
"""

import argparse
import inspect
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bestiary_kernels import gpu
from bestiary_kernels.overlap import triton as overlap

from . import OPERATIONS

#: Bytes of shared memory that a program may have on sm_90.
MOST_SHARED = 227 * 1024


class Nowhere:
    """What Triton asks of the GPU's driver before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead_of_launching(arch: int) -> list[Any]:
    """From now on a launch compiles its kernel and does nothing; the list receives the kernels, or what went wrong."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compiling(self: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> Any:
        try:
            compiled.append(run(self, *args, grid=grid, warmup=True, **settings))
        except Exception as error:
            compiled.append(error)
            raise
        return compiled[-1]

    driver.set_active(Nowhere(arch))  # type: ignore[arg-type]
    JITFunction.run = compiling
    gpu._on_cpu = True
    overlap.is_known = lambda device: arch >= 90  # type: ignore[assignment]
    return compiled


def rows(operation: str) -> Iterator[tuple[str, Callable[[], object], bool]]:
    """The functions of an operation's file, and whether they must load ahead."""
    module = import_module(f"{__package__}.{operation}")
    for name, function in vars(module).items():
        if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_"):
            yield name, function, name in getattr(module, "AHEAD", ())


def loads_ahead(kernel: Any) -> bool:
    """Whether tiles are copied into shared memory while something else happens."""
    return re.search(r"async_copy_global_to_local .*tensor<\d+x\d+x!tt\.ptr", kernel.asm["ttgir"]) is not None


def compiles(name: str, row: Callable[[], object], compiled: list[Any], is_ahead: bool) -> bool:
    """Whether all that a row launches compiles and fits; says what it takes, or what is wrong."""
    compiled.clear()
    begin = time.perf_counter()
    try:
        row()
        assert compiled, "launched nothing"
        for wrong in (one for one in compiled if isinstance(one, Exception)):
            raise wrong
        found = [(kernel.metadata.name, kernel.metadata.shared) for kernel in compiled]
        sizes = {name: max(size for other, size in found if other == name) for name, _ in found}
        assert max(sizes.values()) <= MOST_SHARED, f"more shared memory than there is: {sizes}"
        assert not is_ahead or any(map(loads_ahead, compiled)), "its loop waits for every tile"
        early = [kernel for kernel in compiled if kernel.metadata.launch_pdl]
        assert all("griddepcontrol.wait" in kernel.asm["ptx"] for kernel in early), "begins early and never waits"
        assert all("ptx" in kernel.asm and "cubin" in kernel.asm for kernel in compiled)
    except Exception:
        print(f"{name} failed")
        traceback.print_exc(file=sys.stdout)
        return False
    taken = ", ".join(f"{kernel} {size // 1024} KiB" for kernel, size in sizes.items())
    print(f"{name}: {taken}; {time.perf_counter() - begin:.1f} s", flush=True)
    return True


def main() -> None:
    """Every row of the operations given; the exit status is 1 where one does not compile."""
    options = argparse.ArgumentParser()
    options.add_argument("operations", nargs="*", choices=[*OPERATIONS, []])
    options.add_argument("--arch", type=int, default=90)
    given = options.parse_args()
    compiled = compile_instead_of_launching(given.arch)
    done = [
        compiles(f"{operation}.{name}", row, compiled, is_ahead)
        for operation in given.operations or OPERATIONS
        for name, row, is_ahead in rows(operation)
    ]
    sys.exit(not all(done))


if __name__ == "__main__":
    main()
