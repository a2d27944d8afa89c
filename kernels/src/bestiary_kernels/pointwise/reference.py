"""Sums and products in torch: the meaning of `add` and `scaled`."""

import torch
from torch import Tensor

__all__ = ["add", "scaled"]


def add(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """Return x + y, or x + sigmoid(gate) * y, in float32 and rounded once."""
    return x + y if gate is None else (x.float() + gate.float().sigmoid() * y.float()).to(x.dtype)


def scaled(x: Tensor, factor: float = 1.0, cap: float | None = None) -> Tensor:
    """Return x times the factor as x's dtype has it, softly capped, in float32 and rounded once."""
    wide = x.float() * torch.tensor(factor, dtype=x.dtype).float()
    return (wide if cap is None else cap * torch.tanh(wide / cap)).to(x.dtype)
