"""Sums and products in Triton: a program computes a piece of what lies in one line."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add", "scaled"]

_PIECE = 1024


@triton.jit
def _add(x, y, gate, out, width, GATED: tl.constexpr, BLOCK: tl.constexpr):
    pieces = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    at = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    mask, place = at < width, row * width + at
    addend = tl.load(y + place, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        addend *= 1 / (1 + tl.exp(-tl.load(gate + row).to(tl.float32)))
    sums = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) + addend
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _scale(x, y, count, factor, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * factor
    if CAPPED:
        u = value / cap
        square = tl.minimum(u * u, 0.25 * 0.25)
        # 1 - e loses digits near 0, where a series has them.
        near = u * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835)))))
        e = tl.exp(-2 * tl.abs(u))
        far = (1 - e) / (1 + e)
        value = cap * tl.where(tl.abs(u) < 0.25, near, tl.where(u < 0, -far, far))
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


def add(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """As the reference."""
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    block = min(_PIECE, triton.next_power_of_2(max(width, 1)))
    if out.numel():
        x, y, gate = x.contiguous(), y.contiguous(), None if gate is None else gate.contiguous()
        grid = (rows * triton.cdiv(width, block),)
        _add[grid](x, y, gate, out, width, GATED=gate is not None, BLOCK=block)
    return out


def scaled(x: Tensor, factor: float = 1.0, cap: float | None = None) -> Tensor:
    """As the reference."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if count := x.numel():
        rounded = float(torch.tensor(factor, dtype=x.dtype))
        grid = (triton.cdiv(count, _PIECE),)
        _scale[grid](x, y, count, rounded, float(cap or 1.0), CAPPED=cap is not None, BLOCK=_PIECE)
    return y
