"""Norms."""

import torch

from bestiary_kernels import add_rms_norm

from .draw import DTYPES, Draw, case, close, normal


@case
def rms_norm(draw: Draw, device: torch.device) -> None:
    """Rows of any width, whole or of heads in a wider buffer, with or without a residual."""
    dtype, tokens = draw.choice(DTYPES), draw.integer(0, 9)
    heads, width = draw.choice(((), (), (3,))), draw.choice((1, 64, 576, draw.integer(1, 300)))
    x = normal(draw, tokens, *heads, width + draw.choice((0, 5)), dtype=dtype, device=device)[..., :width]
    residual = normal(draw, *x.shape, dtype=dtype, device=device) if draw.choice((True, False)) else None
    weight = normal(draw, width, dtype=dtype, device=device)
    eps, offset = draw.choice((1e-5, 1e-6)), draw.choice((0.0, 1.0))
    wanted_h = x.double() if residual is None else (x.float() + residual.float()).to(dtype).double()
    y, h = add_rms_norm(x, None if residual is None else residual.clone(), weight, eps, offset)
    assert torch.equal(h.double(), wanted_h)
    root = (wanted_h.square().mean(-1, keepdim=True) + eps).sqrt()
    close(y, wanted_h / root * (weight.double() + offset))
