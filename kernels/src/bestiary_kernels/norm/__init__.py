"""Residual sum and RMS or layer norm. Shapes: T tokens, H heads, D width."""

import torch
from torch import Tensor

from bestiary_kernels import gpu, library
from bestiary_kernels.norm import reference

__all__ = ["add_layer_norm", "add_rms_norm"]


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return (y, h): h = x + residual rounded to the dtype, y = h / sqrt(mean(h^2) + eps) * (offset + weight).

    `x_TD` is [T, D], or [T, H, D] for a norm of each head; rows may be strided. y is computed in float32 and rounded
    once; Gemma's weights count from an `offset` of 1. Without a residual h is `x_TD` itself. With one, its buffer is
    consumed: h may be written into it, so the caller must use h and forget the residual. Raises ValueError for shapes
    or dtypes that do not fit.
    """
    shape, dtype = x_TD.shape, x_TD.dtype
    width = shape[-1]
    if weight_D.shape != (width,):
        raise ValueError(f"add_rms_norm: weight has shape {tuple(weight_D.shape)}, x has width {width}")
    if residual_TD is not None and (residual_TD.shape != shape or residual_TD.dtype is not dtype):
        raise ValueError("add_rms_norm: residual and x differ in shape or dtype")
    if (on_gpu := gpu.kernels("norm", x_TD)) is not None:
        found: tuple[Tensor, Tensor] = on_gpu.add_rms_norm(x_TD, residual_TD, weight_D, eps, offset)
        return found
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
        return function(x_TD, residual_TD, weight_D, eps, offset)
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
        offset,
    )
    return y, x_TD if residual_TD is None else residual_TD


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (y, h): h = x + residual rounded to the dtype, y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias.

    x is [T, D], or [T, H, D] for a norm of each head; rows may be strided. weight and bias are [D], or [H, D] for heads
    with numbers of their own, or None for 1 and 0. y is computed in float32 and rounded once. Without a residual h is x
    itself; with one, its buffer is consumed as `add_rms_norm` does. Raises ValueError for shapes or dtypes that do not
    fit.
    """
    for name, factor in (("weight", weight), ("bias", bias)):
        if factor is not None and (not factor.dim() or factor.shape != x.shape[1:][-factor.dim() :]):
            raise ValueError(f"add_layer_norm: {name} has shape {tuple(factor.shape)}, a row of x {tuple(x.shape[1:])}")
    if residual is not None and (residual.shape != x.shape or residual.dtype is not x.dtype):
        raise ValueError("add_layer_norm: residual and x differ in shape or dtype")
    function = _layer_operator if library.is_traced(x) else reference.add_layer_norm
    return function(x, residual, weight, bias, eps)


@torch.library.custom_op("bestiary::add_rms_norm", mutates_args=())
def _operator(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As `add_rms_norm`, but the residual stays as it is and h is always a new tensor: outputs may alias no input."""
    y, h = reference.add_rms_norm(x, residual, weight, eps, offset)
    return y, h.clone() if residual is None else h


@_operator.register_fake
def _shapes(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("bestiary::add_layer_norm", mutates_args=())
def _layer_operator(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """As `add_layer_norm`, but h is always a new tensor."""
    y, h = reference.add_layer_norm(x, residual, weight, bias, eps)
    return y, h.clone() if residual is None else h


@_layer_operator.register_fake
def _layer_shapes(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)
