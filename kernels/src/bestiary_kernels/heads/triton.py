"""A matrix for each head, in Triton: a program makes some outputs of one head for some tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["heads_linear"]

_COLUMNS = 64


@triton.jit(do_not_specialize=["tokens"])
def _multiply(
    x,
    weight,
    y,
    tokens,
    inputs,
    outputs,
    x_stride,
    x_head_stride,
    x_step,
    head_stride,
    row_stride,
    step,
    y_stride,
    y_head_stride,
    y_step,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    at_x = x + head * x_head_stride + token.to(tl.int64)[:, None] * x_stride
    at_weight = weight + head * head_stride + column[None, :] * step
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, inputs, DEPTH):
        k = begin + tl.arange(0, DEPTH)
        v = tl.load(at_x + k[None, :] * x_step, mask=(token < tokens)[:, None] & (k < inputs)[None, :], other=0.0)
        known = (k < inputs)[:, None] & (column < outputs)[None, :]
        w = tl.load(at_weight + k[:, None] * row_stride, mask=known, other=0.0)
        sums = tl.dot(v, w, sums, input_precision="ieee")
    to = y + head * y_head_stride + token.to(tl.int64)[:, None] * y_stride + column[None, :] * y_step
    tl.store(to, sums.to(y.dtype.element_ty), mask=(token < tokens)[:, None] & (column < outputs)[None, :])


def heads_linear(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """As the reference, into `out` if that is given."""
    tokens, heads, inputs = x.shape
    outputs = weight.shape[2]
    y = torch.empty((tokens, heads, outputs), dtype=x.dtype, device=x.device) if out is None else out
    if y.numel():
        rows = 16 if tokens <= 16 else 32
        grid = (heads, triton.cdiv(outputs, _COLUMNS), triton.cdiv(tokens, rows))
        strides = (*x.stride(), *weight.stride(), *y.stride())
        depth = 128 // x.element_size()
        _multiply[grid](
            x, weight, y, tokens, inputs, outputs, *strides, ROWS=rows, COLUMNS=_COLUMNS, DEPTH=depth, num_stages=3
        )
    return y
