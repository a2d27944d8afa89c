"""Norms in Triton: a program a row, which it reads twice, the second time out of the cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_rms_norm"]

_WIDEST = 4096


@triton.jit
def _add_rms_norm(
    x,
    residual,
    weight,
    y,
    heads,
    width,
    token_stride,
    head_stride,
    eps,
    offset,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row // heads * token_stride + row % heads * head_stride
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        h = tl.load(x + at, mask=at < width, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            before = tl.load(residual + row * width + at, mask=at < width, other=0.0).to(tl.float32)
            # Rounded: the norm sees what the next layer will read.
            rounded = (h + before).to(residual.dtype.element_ty)
            tl.store(residual + row * width + at, rounded, mask=at < width)
            h = rounded.to(tl.float32)
        squares += h * h
    scale = 1 / tl.sqrt(tl.sum(squares) / width + eps)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        if HAS_RESIDUAL:
            h = tl.load(residual + row * width + at, mask=at < width, other=0.0).to(tl.float32)
        else:
            h = tl.load(x + at, mask=at < width, other=0.0).to(tl.float32)
        w = tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32) + offset
        tl.store(y + row * width + at, (h * scale * w).to(y.dtype.element_ty), mask=at < width)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """As the reference; the residual's memory becomes h."""
    rows = x if x.dim() == 3 else x[:, None]
    tokens, heads, width = rows.shape
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    h = None if residual is None else residual.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if tokens * heads:
        _add_rms_norm[(tokens * heads,)](
            rows,
            h,
            weight.contiguous(),
            y,
            heads,
            width,
            rows.stride(0),
            rows.stride(1),
            eps,
            offset,
            HAS_RESIDUAL=h is not None,
            BLOCK=min(_WIDEST, triton.next_power_of_2(max(width, 1))),
        )
    return y, x if h is None else h
