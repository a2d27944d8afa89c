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
    kernels, rows = library.native(x_TD), _rows(x_TD)
    if kernels is None or rows is None or not _are_dense(dtype, weight_D, residual_TD):
        function = _operator if library.is_traced(x_TD) else reference.add_rms_norm
        return function(x_TD, residual_TD, weight_D, eps, offset)
    y = x_TD.new_empty(shape)
    kernels.add_rms_norm(
        library.IS_BF16[dtype],
        x_TD.data_ptr(),
        None if residual_TD is None else residual_TD.data_ptr(),
        weight_D.data_ptr(),
        y.data_ptr(),
        *rows,
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
    if (on_gpu := gpu.kernels("norm", x)) is not None:
        found: tuple[Tensor, Tensor] = on_gpu.add_layer_norm(x, residual, weight, bias, eps)
        return found
    kernels, rows = library.native(x), _rows(x)
    if kernels is None or rows is None or not _are_dense(x.dtype, weight, bias, residual):
        function = _layer_operator if library.is_traced(x) else reference.add_layer_norm
        return function(x, residual, weight, bias, eps)
    y = x.new_empty(x.shape)
    kernels.add_layer_norm(
        library.IS_BF16[x.dtype],
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        None if weight is None else weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        *rows,
        0 if weight is None or weight.dim() == 1 else x.shape[-1],
        0 if bias is None or bias.dim() == 1 else x.shape[-1],
        eps,
    )
    return y, x if residual is None else residual


def _rows(x: Tensor) -> tuple[int, int, int, int, int] | None:
    """Tokens, heads, width and the strides of tokens and heads, for C++; None for what it does not know."""
    shape, strides = x.shape, x.stride()
    if x.dtype not in library.IS_BF16 or len(shape) not in (2, 3) or strides[-1] != 1:
        return None
    if len(shape) == 2:
        return shape[0], 1, shape[1], strides[0], 0
    return shape[0], shape[1], shape[2], strides[0], strides[1]


def _are_dense(dtype: torch.dtype, *given: Tensor | None) -> bool:
    return all(tensor is None or (tensor.dtype is dtype and tensor.is_contiguous()) for tensor in given)


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
