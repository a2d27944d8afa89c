"""Residual sum and RMS norm. Shapes: T tokens, H heads, D width."""

import torch
from torch import Tensor

from bestiary_kernels import library
from bestiary_kernels.norm import reference

__all__ = ["add_rms_norm"]


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return (y, h): h = x + residual rounded to the dtype, y = h / sqrt(mean(h^2) + eps) * (weight + weight_offset).

    `x_TD` is [T, D], or [T, H, D] for a norm of each head; rows may be strided. y is computed in float32 and rounded
    once. Without a residual h is `x_TD` itself. With one, its buffer is consumed: h may be written into it, so the
    caller must use h and forget the residual. Raises ValueError for shapes or dtypes that do not fit.
    """
    shape, dtype = x_TD.shape, x_TD.dtype
    width = shape[-1]
    if weight_D.shape != (width,):
        raise ValueError(f"add_rms_norm: weight has shape {tuple(weight_D.shape)}, x has width {width}")
    if residual_TD is not None and (residual_TD.shape != shape or residual_TD.dtype is not dtype):
        raise ValueError("add_rms_norm: residual and x differ in shape or dtype")
    kernels = library.native(x_TD)
    strides = x_TD.stride()
    if len(shape) == 2:
        strides = (strides[0], 0, strides[1])  # one head
    if (
        kernels is None
        or dtype not in library.IS_BF16
        or weight_D.dtype is not dtype
        or len(strides) != 3
        or strides[2] != 1
        or not weight_D.is_contiguous()
        or not (residual_TD is None or residual_TD.is_contiguous())
    ):
        function = _operator if library.is_traced(x_TD) else reference.add_rms_norm
        return function(x_TD, residual_TD, weight_D, eps, weight_offset)
    y = x_TD.new_empty(shape)
    kernels.add_rms_norm(
        library.IS_BF16[dtype],
        x_TD.data_ptr(),
        None if residual_TD is None else residual_TD.data_ptr(),
        weight_D.data_ptr(),
        y.data_ptr(),
        shape[0],
        1 if len(shape) == 2 else shape[1],
        width,
        strides[0],
        strides[1],
        eps,
        weight_offset,
    )
    return y, x_TD if residual_TD is None else residual_TD


@torch.library.custom_op("bestiary::add_rms_norm", mutates_args=())
def _operator(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As `add_rms_norm`, but the residual stays as it is and h is always a new tensor: outputs may alias no input."""
    y, h = reference.add_rms_norm(x, residual, weight, eps, weight_offset)
    return y, h.clone() if residual is None else h


@_operator.register_fake
def _shapes(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)
