"""Residual sum and norms in torch: the meaning of `add_rms_norm` and `add_layer_norm`."""

import torch
from torch import Tensor

__all__ = ["add_layer_norm", "add_rms_norm"]


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return (y, h): h = x + residual rounded to x's dtype, y = h / rms(h) * (offset + weight).

    RMS norm after Zhang and Sennrich, 2019 (arXiv 1910.07467); float32 inside, y is rounded once.
    """
    h = x if residual is None else x + residual
    wide = h.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * (weight.float() + offset)).to(x.dtype), h


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (y, h): h = x + residual rounded to x's dtype, y = (h - mean(h)) / deviation(h) * weight + bias.

    Layer norm after Ba et al., 2016 (arXiv 1607.06450); float32 inside, y is rounded once.
    """
    h = x if residual is None else x + residual
    wide = h.float()
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype), h
