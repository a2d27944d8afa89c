"""The small sums and products between a model's blocks. Shapes: T tokens, D width."""

import torch
from torch import Tensor

from bestiary_kernels import gpu, library
from bestiary_kernels.pointwise import reference

__all__ = ["add", "scaled"]


def add(x_TD: Tensor, y_TD: Tensor, gate_T1: Tensor | None = None) -> Tensor:
    """Return x + y, or with a gate x + sigmoid(gate) * y: float32, rounded once. Neither's memory is used.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    gated = gate_T1 is None or (gate_T1.shape == (len(x_TD), 1) and gate_T1.dtype is x_TD.dtype)
    if x_TD.dim() != 2 or x_TD.shape != y_TD.shape or x_TD.dtype is not y_TD.dtype or not gated:
        raise ValueError("add: the shapes or dtypes of x, y and gate do not fit")
    if (on_gpu := gpu.kernels("pointwise", x_TD)) is not None:
        found: Tensor = on_gpu.add(x_TD, y_TD, gate_T1)
        return found
    kernels, is_bf16 = library.native(x_TD), library.IS_BF16.get(x_TD.dtype)
    are_dense = x_TD.is_contiguous() and y_TD.is_contiguous() and (gate_T1 is None or gate_T1.is_contiguous())
    if kernels is None or is_bf16 is None or not are_dense:
        return (_add_operator if library.is_traced(x_TD) else reference.add)(x_TD, y_TD, gate_T1)
    out = x_TD.new_empty(x_TD.shape)
    gate_at = None if gate_T1 is None else gate_T1.data_ptr()
    kernels.add(is_bf16, x_TD.data_ptr(), y_TD.data_ptr(), gate_at, out.data_ptr(), *x_TD.shape)
    return out


def scaled(x: Tensor, factor: float = 1.0, cap: float | None = None) -> Tensor:
    """Return factor * x of any shape, and with a `cap` cap * tanh(factor * x / cap): float32, rounded once.

    The factor counts as x's dtype has it. Raises ValueError for a cap that is not above 0.
    """
    if cap is not None and not cap > 0:
        raise ValueError(f"scaled: the cap is {cap}; it must be above 0")
    if (on_gpu := gpu.kernels("pointwise", x)) is not None:
        found: Tensor = on_gpu.scaled(x, factor, cap)
        return found
    kernels, is_bf16 = library.native(x), library.IS_BF16.get(x.dtype)
    if kernels is None or is_bf16 is None or not x.is_contiguous():
        return (_scaled_operator if library.is_traced(x) else reference.scaled)(x, factor, cap)
    y = x.new_empty(x.shape)
    kernels.scaled(is_bf16, x.data_ptr(), y.data_ptr(), x.numel(), factor, cap or 0.0)
    return y


@torch.library.custom_op("bestiary::add", mutates_args=())
def _add_operator(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    return reference.add(x, y, gate)


@_add_operator.register_fake
def _add_shape(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("bestiary::scaled", mutates_args=())
def _scaled_operator(x: Tensor, factor: float = 1.0, cap: float | None = None) -> Tensor:
    return reference.scaled(x, factor, cap)


@_scaled_operator.register_fake
def _scaled_shape(x: Tensor, factor: float = 1.0, cap: float | None = None) -> Tensor:
    return x.new_empty(x.shape)
