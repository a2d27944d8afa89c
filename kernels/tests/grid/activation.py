"""Activations, plain and gated."""

import math

import torch
from torch import Tensor

from bestiary_kernels import activation, gated_activation

from .draw import DTYPES, Draw, case, close, within

#: gelu adds what is nearly -1 to 1 where x is far below 0, so it has no digits there.
_GELU_SCALE = 0.1


def _wanted(x: Tensor, kind: str) -> Tensor:
    """Of float64."""
    if kind in ("relu", "relu2"):
        return x.clamp(min=0) ** (2 if kind == "relu2" else 1)
    if kind == "gelu":
        return x / 2 * torch.special.erfc(-x / math.sqrt(2))
    if kind == "gelu_tanh":
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / (1 + torch.exp(-x * (1.702 if kind == "quick_gelu" else 1)))


@case
def plain_activation(draw: Draw, device: torch.device) -> None:
    """Of any shape and layout: dense, rows of a wider buffer, or turned round."""
    dtype, kind = draw.choice(DTYPES), draw.choice(("silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu"))
    outer = draw.choice(((), (3,), (draw.integer(0, 7),), (2, 3)))
    width = draw.choice((1, 64, 1030, draw.integer(1, 100)))
    x = within(draw, *outer, width, more=(0, 0, 3), dtype=dtype, device=device).mul_(4)
    x = x.transpose(0, -1) if draw.choice((True, False, False)) else x
    y = activation(x, kind)
    assert y.dtype is dtype
    wanted = _wanted(x.double(), kind)
    close(y, wanted, wanted.abs().mean().clamp(min=_GELU_SCALE))


@case
def gated(draw: Draw, device: torch.device) -> None:
    """Rows of gate and up side by side, dense or in a wider buffer."""
    dtype, kind, tokens = draw.choice(DTYPES), draw.choice(("silu", "gelu", "gelu_tanh", "relu")), draw.integer(0, 7)
    width = draw.choice((1, 64, 1030, draw.integer(1, 100)))
    both = within(draw, tokens, 2 * width, more=(0, 0, 3), dtype=dtype, device=device).mul_(4)
    gate, up = both.double().split(width, 1)
    wanted = _wanted(gate, kind) * up
    close(gated_activation(both, kind), wanted, torch.maximum(wanted.abs().mean(), up.abs() * _GELU_SCALE))
