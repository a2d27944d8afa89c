"""A matrix for each head. Shapes: T tokens, H heads, K inputs and N outputs of a head."""

from struct import Struct

import torch
from torch import Tensor

from bestiary_kernels import gpu, library
from bestiary_kernels.heads import reference

__all__ = ["heads_linear"]

_CALL = Struct("10q")  # HeadsCall in cpu.cpp
#: With more tokens torch's batched product is faster.
_MOST_TOKENS = 64


def heads_linear(x_THK: Tensor, weight_HKN: Tensor, out: Tensor | None = None) -> Tensor:
    """Return [T, H, N]: each head's row times its matrix, in float32 and rounded once.

    Any of them may be slices; without `out` the result is dense. Raises ValueError for shapes or dtypes that do not
    fit.
    """
    tokens, heads, inputs = x_THK.shape
    shape = (tokens, heads, weight_HKN.shape[-1])
    if weight_HKN.dim() != 3 or weight_HKN.shape[:2] != (heads, inputs) or weight_HKN.dtype is not x_THK.dtype:
        raise ValueError(
            f"heads_linear: x {x_THK.dtype} {tuple(x_THK.shape)} does not fit "
            f"the weight {weight_HKN.dtype} {tuple(weight_HKN.shape)}"
        )
    if out is not None and (out.shape != shape or out.dtype is not x_THK.dtype):
        raise ValueError(f"heads_linear: out must be {shape} in x's dtype")
    if tokens <= _MOST_TOKENS:
        if (on_gpu := gpu.kernels("heads", x_THK)) is not None:
            found: Tensor = on_gpu.heads_linear(x_THK, weight_HKN, out)
            return found
        if (kernels := library.native(x_THK)) is not None:
            y = x_THK.new_empty(shape) if out is None else out
            if _multiply(kernels, x_THK, weight_HKN, y):
                return y
    y = (_operator if library.is_traced(x_THK) else reference.heads_linear)(x_THK, weight_HKN)
    return y.contiguous() if out is None else out.copy_(y)


def _multiply(kernels: library.Kernels, x: Tensor, weight: Tensor, y: Tensor) -> bool:
    """In C++; False where it does not know the dtype or the layouts."""
    is_bf16 = library.IS_BF16.get(x.dtype)
    x_strides, strides, y_strides = x.stride(), weight.stride(), y.stride()
    if is_bf16 is None or not x_strides[2] == strides[2] == y_strides[2] == 1:
        return False
    call = _CALL.pack(*x.shape, y.shape[2], *x_strides[:2], *strides[:2], *y_strides[:2])
    failed = kernels.heads_linear(is_bf16, x.data_ptr(), weight.data_ptr(), y.data_ptr(), call)
    if failed:
        library.fail("heads_linear", failed)
    return True


@torch.library.custom_op("bestiary::heads_linear", mutates_args=())
def _operator(x: Tensor, weight: Tensor) -> Tensor:
    return reference.heads_linear(x, weight).contiguous()


@_operator.register_fake
def _shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[2])
