"""Norms in Triton: a program holds whole rows in registers, one that is wide or several that are narrow.

Knows no number of tokens when it compiles: a kernel is made for a width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bestiary_kernels.overlap.triton import overlapping, release_next, wait_for_last

__all__ = ["add_layer_norm", "add_rms_norm"]

#: What a program holds at least, where there are rows enough.
_LEAST = 1024


@triton.jit
def _summed(x, residual, x_at, at, mask, HAS_RESIDUAL: tl.constexpr):
    """Load a tile of x; with a residual add it, and leave the sum in its memory."""
    h = tl.load(x + x_at, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        before = tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        # Rounded: the norm sees what the next layer will read.
        rounded = (h + before).to(residual.dtype.element_ty)
        tl.store(residual + at, rounded, mask=mask)
        h = rounded.to(tl.float32)
    return h


@triton.jit(do_not_specialize=["count"])
def _add_rms_norm(
    x,
    residual,
    weight,
    y,
    count,
    heads,
    width,
    token_stride,
    head_stride,
    eps,
    offset,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    release_next(OVERLAPS)
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask, at = (row < count) & (column < width), row * width + column
    x_at = row // heads * token_stride + row % heads * head_stride + column
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + offset
    wait_for_last(OVERLAPS)
    h = _summed(x, residual, x_at, at, mask, HAS_RESIDUAL)
    scale = 1 / tl.sqrt(tl.sum(h * h, 1) / width + eps)
    tl.store(y + at, (h * scale[:, None] * w).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _add_layer_norm(
    x,
    residual,
    weight,
    bias,
    y,
    count,
    heads,
    width,
    token_stride,
    head_stride,
    weight_stride,
    bias_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    release_next(OVERLAPS)
    wait_for_last(OVERLAPS)
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask, at, head = (row < count) & (column < width), row * width + column, row % heads
    x_at = row // heads * token_stride + head * head_stride + column
    h = _summed(x, residual, x_at, at, mask, HAS_RESIDUAL)
    # What lies past a row's end must not count as a distance from the mean.
    centred = tl.where(mask, h - (tl.sum(h, 1) / width)[:, None], 0.0)
    z = centred * (1 / tl.sqrt(tl.sum(centred * centred, 1) / width + eps))[:, None]
    if HAS_WEIGHT:
        z *= tl.load(weight + head * weight_stride + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + head * bias_stride + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=mask)


def _rows(x: Tensor) -> Tensor:
    """x as [tokens, heads, width] whose rows are dense."""
    rows = x if x.dim() == 3 else x[:, None]
    return rows if rows.stride(2) == 1 else rows.contiguous()


def _tile(width: int) -> tuple[int, int, int]:
    """How many rows a program takes, the power of two that holds one, and the warps for both."""
    block = triton.next_power_of_2(max(width, 1))
    rows = max(1, _LEAST // block)
    return rows, block, min(16, max(4, rows * block // 1024))


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """As the reference; the residual's memory becomes h."""
    rows = _rows(x)
    tokens, heads, width = rows.shape
    h = None if residual is None else residual.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    at_once, block, warps = _tile(width)
    if x.numel():
        _add_rms_norm[(triton.cdiv(tokens * heads, at_once),)](
            rows,
            h,
            weight.contiguous(),
            y,
            tokens * heads,
            heads,
            width,
            rows.stride(0),
            rows.stride(1),
            eps,
            offset,
            HAS_RESIDUAL=h is not None,
            ROWS=at_once,
            BLOCK=block,
            num_warps=warps,
            **overlapping(x),
        )
    return y, x if h is None else h


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """As the reference; the residual's memory becomes h."""
    rows = _rows(x)
    tokens, heads, width = rows.shape
    h = None if residual is None else residual.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    at_once, block, warps = _tile(width)
    if x.numel():
        _add_layer_norm[(triton.cdiv(tokens * heads, at_once),)](
            rows,
            h,
            None if weight is None else weight.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            tokens * heads,
            heads,
            width,
            rows.stride(0),
            rows.stride(1),
            0 if weight is None or weight.dim() == 1 else width,
            0 if bias is None or bias.dim() == 1 else width,
            eps,
            HAS_RESIDUAL=h is not None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            ROWS=at_once,
            BLOCK=block,
            num_warps=warps,
            **overlapping(x),
        )
    return y, x if h is None else h
