"""Sums and products of single numbers."""

import torch

from bestiary_kernels import add, scaled

from .draw import DTYPES, Draw, case, close, normal, within


@case
def sums(draw: Draw, device: torch.device) -> None:
    """Of two tensors, dense or in wider buffers; perhaps a gate of each row weighs the second."""
    dtype, rows = draw.choice(DTYPES), draw.integer(0, 9)
    width = draw.choice((1, 64, 3000, draw.integer(1, 100)))
    x, y = (within(draw, rows, width, more=(0, 0, 3), dtype=dtype, device=device) for _ in range(2))
    gate = 3 * normal(draw, rows, 1, dtype=dtype, device=device) if draw.choice((True, False)) else None
    addend = y.double() if gate is None else y.double() * gate.double().sigmoid()
    close(add(x, y, gate), x.double() + addend, x.double().abs() + addend.abs())


@case
def products_with_a_number(draw: Draw, device: torch.device) -> None:
    """Of any shape, perhaps softly capped: far within the cap, and far beyond it."""
    dtype, width = draw.choice(DTYPES), draw.choice((1, 64, 20000, draw.integer(1, 100)))
    size, factor = draw.choice((0.01, 1.0, 30.0)), draw.choice((1.0, 59.866, -0.3))
    cap = draw.choice((None, 1.0, 30.0))
    x = size * normal(draw, *draw.choice(((), (3,), (0,))), width, dtype=dtype, device=device)
    wanted = x.double() * torch.tensor(factor, dtype=dtype).double().to(device)
    close(scaled(x, factor, cap), wanted if cap is None else cap * torch.tanh(wanted / cap))
