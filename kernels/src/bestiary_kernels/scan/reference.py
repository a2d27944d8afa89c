"""Selective scan in torch: the meaning of `selective_scan`."""

import torch
from torch import Tensor
from torch.nn import functional

from bestiary_kernels.states import load, spans, store

__all__ = ["selective_scan"]


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    states: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    query_starts: Tensor,
    fresh: Tensor,
    gate: Tensor | None,
    softplus: bool,
) -> Tensor:
    """Return [T, C] and write the sequences' states; see `bestiary_kernels.selective_scan`."""
    starts, lengths = spans("selective_scan", query_starts, len(x))
    h = load("selective_scan", states, read_slots, write_slots, fresh)
    wide, dt, a, b, c = x.float(), dt.float(), a.float(), b.float(), c.float()
    if softplus:
        dt = functional.softplus(dt)
    y = d.float() * wide
    for step in range(int(lengths.max()) if len(h) else 0):
        active = (lengths > step).nonzero().squeeze(-1)
        token = starts[active] + step
        brought = (dt[token] * wide[token])[:, :, None] * b[token, None]
        h[active] = torch.exp(dt[token][:, :, None] * a) * h[active] + brought
        y[token] += (h[active] * c[token, None]).sum(-1)
    store(states, write_slots, h)
    if gate is not None:
        y = y * functional.silu(gate.float())
    return y.to(x.dtype)
