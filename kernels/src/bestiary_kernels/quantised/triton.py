"""Products with weights of few bits in Triton: in a tile codes become numbers of x's dtype, for a dot product.

Few rows are padded to the sixteen that a dot product needs: its time is that of reading the codes. So that all
processors read, the inputs are cut into shares; a second kernel adds these up in their order.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["linear"]

# Programs for each processor that keep its memory busy, and the most shares that inputs are cut into.
_WAVES, _MOST_SHARES = 4, 16


@triton.jit(do_not_specialize=["rows"])
def _linear(  # type: ignore[no-untyped-def]
    x,
    codes,
    scales,
    bias,
    y,
    rows,
    outputs,
    inputs,
    x_stride,
    code_stride,
    groups,
    tiles,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    share = tl.program_id(2)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    x_rows = x + m[:, None] * x_stride
    if BITS == 8:
        for tile in range(share * tiles, share * tiles + tiles):
            k = tile * BLOCK_B + tl.arange(0, BLOCK_B)
            at = codes + n[:, None] * code_stride + k[None, :]
            code = tl.load(at, mask=(n[:, None] < outputs) & (k[None, :] < inputs), other=0)
            v = tl.load(x_rows + k[None, :], mask=(m[:, None] < rows) & (k[None, :] < inputs), other=0.0)
            w = code.to(tl.float32).to(x.dtype.element_ty)
            sums = tl.dot(v, tl.trans(w), sums, input_precision="ieee")
        scale = tl.load(scales + n, mask=n < outputs, other=0.0)
        sums *= scale[None, :]
    else:
        # A byte holds an input of the first half of a group and the same of the second.
        HALF: tl.constexpr = GROUP // 2
        SOME: tl.constexpr = BLOCK_B // HALF
        within = tl.arange(0, HALF)
        for tile in range(share * tiles, share * tiles + tiles):
            g = tile * SOME + tl.arange(0, SOME)
            is_there = (n[:, None] < outputs) & (g[None, :] < groups)
            scale = tl.load(scales + n[:, None] * groups + g[None, :], mask=is_there, other=0.0).to(tl.float32)
            at = codes + n[:, None, None] * code_stride + g[None, :, None] * HALF + within[None, None, :]
            pair = tl.load(at, mask=is_there[:, :, None], other=0).to(tl.int32)
            low = ((pair << 28) >> 28).to(tl.float32) * scale[:, :, None]
            high = ((pair << 24) >> 28).to(tl.float32) * scale[:, :, None]
            low = tl.reshape(low.to(x.dtype.element_ty), (BLOCK_N, BLOCK_B))
            high = tl.reshape(high.to(x.dtype.element_ty), (BLOCK_N, BLOCK_B))
            place = tl.arange(0, BLOCK_B)
            k = (tile * SOME + place // HALF) * GROUP + place % HALF
            v = tl.load(x_rows + k[None, :], mask=(m[:, None] < rows) & (k[None, :] < inputs), other=0.0)
            sums = tl.dot(v, tl.trans(low), sums, input_precision="ieee")
            k += HALF
            v = tl.load(x_rows + k[None, :], mask=(m[:, None] < rows) & (k[None, :] < inputs), other=0.0)
            sums = tl.dot(v, tl.trans(high), sums, input_precision="ieee")
    if HAS_BIAS and not IS_SHARE:
        sums += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    to = y + (share * rows.to(tl.int64) + m[:, None]) * outputs + n[None, :]
    tl.store(to, sums.to(y.dtype.element_ty), mask=(m[:, None] < rows) & (n[None, :] < outputs))


@triton.jit(do_not_specialize=["size"])
def _add_up(parts, bias, y, size, outputs, SHARES: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for share in tl.static_range(SHARES):
        total += tl.load(parts + share * size + at, mask=at < size, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % outputs, mask=at < size, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < size)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def linear(x: Tensor, codes: Tensor, scales: Tensor, bits: int, group: int, bias: Tensor | None) -> Tensor:
    """x [T, K] times the weight of codes and scales as `pack_rows` lays them, plus the bias: [T, N]."""
    (rows, inputs), (outputs, groups) = x.shape, scales.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if not rows * outputs:
        return y
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128
    block_n, block_b = (64 if block_m < 64 else 128), (128 if bits == 8 and block_m < 64 else 64)
    if x.dtype is torch.float32:
        block_m, block_n, block_b = min(block_m, 32), 32, 64
    tiles, blocks = triton.cdiv(codes.shape[1], block_b), triton.cdiv(outputs, block_n) * triton.cdiv(rows, block_m)
    shares = max(1, min(_MOST_SHARES, tiles, _WAVES * _processors(x.device) // blocks))
    tiles = triton.cdiv(tiles, shares)
    to = y if shares == 1 else torch.empty(shares, rows, outputs, dtype=torch.float32, device=x.device)
    _linear[(triton.cdiv(outputs, block_n), triton.cdiv(rows, block_m), shares)](
        x,
        codes,
        scales,
        bias,
        to,
        rows,
        outputs,
        inputs,
        x.stride(0),
        codes.shape[1],
        groups,
        tiles,
        BITS=bits,
        GROUP=group,
        HAS_BIAS=bias is not None,
        IS_SHARE=shares > 1,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_B=block_b,
        num_warps=8 if block_m == 128 else 4,
        num_stages=4 if block_m < 64 else 3 if bits == 8 else 2,
    )
    if shares > 1:
        size, block = rows * outputs, 1024
        _add_up[(triton.cdiv(size, block),)](
            to, bias, y, size, outputs, SHARES=shares, HAS_BIAS=bias is not None, BLOCK=block
        )
    return y
