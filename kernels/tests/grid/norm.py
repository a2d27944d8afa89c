"""Norms."""

import torch
from torch import Tensor

from bestiary_kernels import add_layer_norm, add_rms_norm

from .draw import DTYPES, Draw, case, close, normal, within


def _input(draw: Draw, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Rows of any width, whole or of heads in a wider buffer, and perhaps a residual."""
    dtype, tokens = draw.choice(DTYPES), draw.integer(0, 9)
    heads, width = draw.choice(((), (), (3,))), draw.choice((1, 64, 576, draw.integer(1, 300)))
    x = within(draw, tokens, *heads, width, more=(0, 5), dtype=dtype, device=device)
    return x, normal(draw, *x.shape, dtype=dtype, device=device) if draw.choice((True, False)) else None


def _sum(x: Tensor, residual: Tensor | None) -> Tensor:
    """What h must be, to the bit."""
    return x.double() if residual is None else (x.float() + residual.float()).to(x.dtype).double()


@case
def rms_norm(draw: Draw, device: torch.device) -> None:
    x, residual = _input(draw, device)
    weight = normal(draw, x.shape[-1], dtype=x.dtype, device=device)
    eps, offset = draw.choice((1e-5, 1e-6)), draw.choice((0.0, 1.0))
    wanted_h = _sum(x, residual)
    y, h = add_rms_norm(x, None if residual is None else residual.clone(), weight, eps, offset)
    assert torch.equal(h.double(), wanted_h)
    root = (wanted_h.square().mean(-1, keepdim=True) + eps).sqrt()
    close(y, wanted_h / root * (weight.double() + offset))


@case
def layer_norm(draw: Draw, device: torch.device) -> None:
    """With a weight, a bias, both or none; of each head where there are heads, or of all."""
    x, residual = _input(draw, device)
    shapes = (None, x.shape[-1:], x.shape[1:])
    weight, bias = (
        None if shape is None else normal(draw, *shape, dtype=x.dtype, device=device)
        for shape in (draw.choice(shapes), draw.choice(shapes))
    )
    eps, wanted_h = draw.choice((1e-5, 1e-6)), _sum(x, residual)
    y, h = add_layer_norm(x, None if residual is None else residual.clone(), weight, bias, eps)
    assert torch.equal(h.double(), wanted_h)
    centred = wanted_h - wanted_h.mean(-1, keepdim=True)
    wanted = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    wanted = wanted if weight is None else wanted * weight.double()
    close(y, wanted if bias is None else wanted + bias.double())
