"""A matrix for each head."""

import torch

from bestiary_kernels import heads_linear

from .draw import DTYPES, Draw, case, close, normal, poisoned, within


@case
def heads_product(draw: Draw, device: torch.device) -> None:
    """Rows that are slices, a weight that is one or lies turned round, and perhaps a slice to write to."""
    dtype, tokens, heads = draw.choice(DTYPES), draw.choice((0, 1, 5, 13, 70)), draw.integer(1, 5)
    inputs, outputs = (draw.choice((1, 64, 130, draw.integer(1, 70))) for _ in range(2))
    x = within(draw, tokens, heads, inputs, more=(0, 3), dtype=dtype, device=device)
    if draw.choice((True, False)):
        weight = within(draw, heads, inputs, outputs, more=(0, 3), dtype=dtype, device=device)
    else:
        weight = normal(draw, heads, outputs, inputs, dtype=dtype, device=device).transpose(1, 2)
    weight *= inputs**-0.5
    whole = poisoned(tokens, heads, outputs + 2, dtype=dtype, device=device)
    out = whole[..., 1:-1] if draw.choice((True, False)) else None
    y = heads_linear(x, weight, out)
    assert y.is_contiguous() if out is None else (y is out and whole[..., [0, -1]].isnan().all())
    wide, by = x.double(), weight.double()
    size = torch.einsum("thk,hkn->thn", wide.abs(), by.abs())
    close(y, torch.einsum("thk,hkn->thn", wide, by), size)
