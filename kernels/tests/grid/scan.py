"""Selective scans."""

import torch
from torch.nn import functional

from bestiary_kernels import selective_scan

from .draw import DTYPES, Draw, case, close, normal
from .states import Sequences, strided


@case
def scan(draw: Draw, device: torch.device) -> None:
    """Ragged steps of sequences old and new, with states of any size; steps as they are or before the softplus."""
    dtype, softplus = draw.choice(DTYPES), draw.choice((True, False))
    channels, numbers = draw.choice((1, 16, 64, draw.integer(1, 90))), draw.choice((16, 16, 8, 1, 5, 32, 24, 80))
    sequences = Sequences.drawn(draw, (channels, numbers), torch.float32, device)
    tokens, given = sequences.tokens, {"dtype": dtype, "device": device}
    x, dt = strided(draw, tokens, channels, **given), strided(draw, tokens, channels, **given)
    dt = (4 * dt if softplus else dt.abs()).to(dtype)
    b, c = strided(draw, tokens, numbers, **given), strided(draw, tokens, numbers, **given)
    gate = strided(draw, tokens, channels, **given) if draw.choice((True, False)) else None
    a = -normal(draw, channels, numbers, dtype=torch.float32, device=device).exp()
    d = normal(draw, channels, dtype=torch.float32, device=device)
    y = selective_scan(x, dt, a, b, c, d, *sequences.arguments(), gate, softplus)
    steps = functional.softplus(dt.double()) if softplus else dt.double()
    gates = torch.ones_like(steps) if gate is None else functional.silu(gate.double())
    wanted, scales = (torch.zeros(tokens, channels, dtype=torch.float64, device=device) for _ in range(2))
    kept, sizes = [], []
    for i, span in enumerate(sequences.spans()):
        h = sequences.start(i)
        size = h.abs()
        for t in range(span.start, span.stop):
            decay = (steps[t, :, None] * a.double()).exp()
            brought = torch.outer(steps[t] * x[t].double(), b[t].double())
            h, size = decay * h + brought, decay * size + brought.abs()
            wanted[t] = (h @ c[t].double() + d.double() * x[t].double()) * gates[t]
            scales[t] = (size @ c[t].double().abs() + (d.double() * x[t].double()).abs()) * gates[t].abs()
        kept.append(h)
        sizes.append(size)
    close(y, wanted, scales)
    sequences.check(kept, sizes)
