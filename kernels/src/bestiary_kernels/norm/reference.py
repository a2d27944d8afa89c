"""Residual sum and RMS norm in torch: the meaning of `add_rms_norm`."""

import torch
from torch import Tensor

__all__ = ["add_rms_norm"]


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return (y, h): h = x + residual rounded to x's dtype, y = h / rms(h) * (weight + weight_offset).

    RMS norm after Zhang and Sennrich, 2019 (arXiv 1910.07467); float32 inside, y is rounded once.
    """
    h = x if residual is None else x + residual
    wide = h.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * (weight.float() + weight_offset)).to(x.dtype), h
