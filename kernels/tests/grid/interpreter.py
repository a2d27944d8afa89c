"""Triton's interpreter, mended while cases run where it does not compute as every GPU does.

It cuts a float32 down to bfloat16 instead of rounding it, and multiplies matrices of bfloat16 as if they were integers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from bestiary_kernels import gpu

__all__ = ["interpreted"]


@contextmanager
def interpreted() -> Iterator[None]:
    """Let Triton's kernels compute on the CPU, and round as on a GPU."""
    from triton import language
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def rounding(self: Any, value: Any, kind: Any) -> Any:
        if (value.dtype.scalar, kind.scalar) == (language.float32, language.bfloat16):
            bits = np.ascontiguousarray(value.data).view(np.uint32).astype(np.uint64)
            halves = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            halves = np.where(np.isnan(value.data), np.uint16(0x7FC0), halves)
            return interpreter.TensorHandle(halves, kind.scalar)
        if (value.dtype.scalar, kind.scalar) == (language.bfloat16, language.float32):
            wide = (np.ascontiguousarray(value.data).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            return interpreter.TensorHandle(wide, kind.scalar)
        return cast(self, value, kind)

    def widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == language.bfloat16:
            a, b = (rounding(self, side, language.float32) for side in (a, b))
        return dot(self, a, b, *rest)

    builder.cast_impl, builder.create_dot = rounding, widened
    try:
        with gpu.interpreted():
            yield
    finally:
        builder.cast_impl, builder.create_dot = cast, dot
