"""Rows of a table."""

import torch

from bestiary_kernels import embedding

from .draw import DTYPES, Draw, case, normal


@case
def rows_of_a_table(draw: Draw, device: torch.device) -> None:
    """Of any dtype, to the bit, out of a dense table or a part of one; a row may come twice."""
    rows, width, tokens = draw.integer(1, 40), draw.choice((1, 64, 2100, draw.integer(1, 70))), draw.integer(0, 9)
    dtype = draw.choice((*DTYPES, torch.float16, torch.int8))
    whole = (9 * normal(draw, rows, width + draw.choice((0, 0, 3)), dtype=torch.float32, device=device)).to(dtype)
    table = whole[:, :width]
    ids = torch.tensor([draw.integer(0, rows - 1) for _ in range(tokens)], dtype=torch.int64, device=device)
    ids = ids.repeat_interleave(2)[::2] if draw.choice((True, False)) else ids
    y = embedding(table, ids)
    assert y.dtype is dtype and torch.equal(y, table[ids])
