"""Where Triton's kernels compute: on GPUs, and on a CPU under Triton's interpreter, where a test asks for that.

Knows no operation: each keeps its kernels in a module of its own, `triton.py` beside its reference, which is imported
when the first tensor comes to it. Without Triton the references compute.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module, util
from typing import Any

import torch
from torch import Tensor

__all__ = ["INTERPRETED", "interpreted", "is_installed", "kernels"]

#: Triton reads this variable when a kernel is defined: from then on its kernels run in Python, on any device.
INTERPRETED = "TRITON_INTERPRET"

_on_cpu = False


@cache
def is_installed() -> bool:
    """Whether there is a Triton."""
    return util.find_spec("triton") is not None


def kernels(operation: str, tensor: Tensor) -> Any:
    """The module with an operation's Triton kernels, for a call on `tensor`; None where others compute it."""
    if not (tensor.is_cuda or _on_cpu) or type(tensor) is not Tensor or torch.compiler.is_compiling():
        return None
    return _module(operation)


@cache
def _module(operation: str) -> Any:
    return import_module(f"bestiary_kernels.{operation}.triton") if is_installed() else None


@contextmanager
def interpreted() -> Iterator[None]:
    """Let Triton's interpreter compute what is on the CPU. Raises RuntimeError unless TRITON_INTERPRET=1 is set."""
    global _on_cpu
    if os.environ.get(INTERPRETED) != "1" or not is_installed():
        raise RuntimeError(f"Triton computes on a CPU only with {INTERPRETED}=1, set before a kernel is defined")
    before, _on_cpu = _on_cpu, True
    try:
        yield
    finally:
        _on_cpu = before
