"""Memory in large pages: what is taken is its owner's alone, and goes back when the owner goes."""

import gc
import mmap
import os
import subprocess
import sys
import weakref

import pytest
import torch

from bestiary_kernels import memory
from bestiary_kernels.memory import lasting

LARGE = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_many_of_all_sizes_do_not_overlap(dtype: torch.dtype) -> None:
    shapes = [(3, 5), (600, 1001), (1, 1 << 20), (5000, 4099), (77, 4000), (2, 3, 70001), (0, 8)]
    tensors = [lasting(shape, dtype) for shape in shapes * 3]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    for number, tensor in enumerate(tensors):
        assert tuple(tensor.shape) == shapes[number % len(shapes)]
        assert tensor.dtype is dtype
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0 or not tensor.numel()
        assert bool((tensor == number).all())


@LARGE
def test_memory_goes_when_all_that_was_taken_of_it_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[mmap.mmap]] = []
    new = memory.zeros

    def noted(size: int) -> mmap.mmap:
        found = new(size)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(memory, "zeros", noted)
    monkeypatch.setattr(memory, "_chunk", None)
    alone, first, second = (lasting((size,), torch.uint8) for size in (40 << 20, 1 << 20, 1 << 20))
    assert len(made) == 2
    del alone
    gc.collect()
    assert made[0]() is None
    memory._chunk = None  # as when the next chunk is begun
    del first
    gc.collect()
    assert made[1]() is not None
    second.fill_(7)
    del second
    gc.collect()
    assert made[1]() is None


@LARGE
def test_a_system_without_large_pages_lends_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *given: int) -> None:
            raise OSError("not built in")

    monkeypatch.setattr(memory.mmap, "mmap", Refusing)
    monkeypatch.setattr(memory, "_chunk", None)
    assert bool((lasting((1 << 20,), torch.int8).fill_(3) == 3).all())


FAULTS = """
import resource, sys
from bestiary_kernels.memory import keep_freed
import torch
if sys.argv[1] == "kept":
    keep_freed()
fewest = 1 << 30
for size in 8 * [48, 40, 44]:  # an aligned piece fits into its own hole only if there is room
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size << 20, dtype=torch.uint8)
    fewest = min(fewest, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun)
print(fewest)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_results_that_were_freed_are_pages_that_are_there() -> None:
    def faults(how: str) -> int:
        # A checker of memory, which `make sanitize` loads first, would bring a malloc of its own.
        plain = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "PYTHONPATH")}
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=plain).stdout)

    assert faults("kept") < 100
    assert faults("given back") > 2000
