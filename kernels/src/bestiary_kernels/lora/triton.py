"""Low-rank adapters in Triton: two launches, whose rows find their adapter through their slot; nothing is sorted.

Few rows get programs of their own. Of many, a program takes a tile of neighbours, which mostly share an adapter, and
multiplies once for each adapter among them. Slots and ranks that are none leave their rows and parts as they are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bestiary_kernels.overlap.triton import overlapping, release_next, wait_for_last

__all__ = ["lora"]

#: Rows up to which each has a program of its own.
_FEW_ROWS = 128
#: Inputs that a program of a single row adds up at most, and outputs that it writes: more programs than rows, so that
#: the device is not idle.
_DEPTH, _COLUMNS = 512, 512
#: Rows of a tile, and the outputs that a program writes of them.
_TILE, _TILE_COLUMNS = 32, 64
#: Ranks that a program takes at a time.
_RANKS = 16


@triton.jit
def _rank(ranks, slot, part, parts, most_rank):
    """How many ranks count, 0 for a number that cannot be."""
    rank = tl.load(ranks + slot * parts + part)
    return tl.where((rank < 0) | (rank > most_rank), 0, rank)


@triton.jit(do_not_specialize=["rows"])
def _shrink_row(
    x,
    slots,
    down,
    ranks,
    inner,
    rows,
    x_stride,
    inputs,
    count,
    parts,
    most_rank,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """inner[split, row, part, rank] = DEPTH inputs of x[row] . down[slot, part, rank]"""
    release_next(OVERLAPS)
    wait_for_last(OVERLAPS)
    row, split = tl.program_id(0), tl.program_id(2)
    blocks = tl.cdiv(most_rank, RANKS)
    part, first = tl.program_id(1) // blocks, tl.program_id(1) % blocks * RANKS
    slot = tl.load(slots + row).to(tl.int64)
    if (slot < 0) | (slot >= count):
        return
    rank = _rank(ranks, slot, part, parts, most_rank)
    if first >= rank:
        return
    r, k = first + tl.arange(0, RANKS), split * DEPTH + tl.arange(0, DEPTH)
    at_down = down + (((slot * parts + part) * most_rank + r) * inputs)[:, None]
    w = tl.load(at_down + k[None, :], mask=(r < rank)[:, None] & (k < inputs)[None, :], other=0.0)
    v = tl.load(x + row.to(tl.int64) * x_stride + k, mask=k < inputs, other=0.0).to(tl.float32)
    to = inner + ((split.to(tl.int64) * rows + row) * parts + part) * most_rank + r
    tl.store(to, tl.sum(v[None, :] * w.to(tl.float32), 1), mask=r < rank)


@triton.jit(do_not_specialize=["rows", "splits"])
def _expand_row(
    y,
    slots,
    up,
    ranks,
    starts,
    inner,
    rows,
    y_stride,
    y_step,
    columns,
    count,
    parts,
    most_rank,
    splits,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Some columns of a part of y[row] += the sum over splits of inner[split, row, part] . up[slot, :, columns]"""
    release_next(OVERLAPS)
    wait_for_last(OVERLAPS)
    row, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(columns, COLUMNS)
    part, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    slot = tl.load(slots + row).to(tl.int64)
    begin, end = tl.load(starts + part), tl.minimum(tl.load(starts + part + 1), columns)
    begin = tl.minimum(tl.maximum(begin, 0), columns) + block * COLUMNS
    if (slot < 0) | (slot >= count) | (begin >= end):
        return
    rank = _rank(ranks, slot, part, parts, most_rank)
    if rank == 0:
        return
    # Nothing waits for the sum of what comes before it: all that a program reads is asked for at once.
    column, split = begin + tl.arange(0, COLUMNS), tl.arange(0, SPLITS)
    to = y + row * y_stride + column.to(tl.int64) * y_step
    sums = tl.load(to, mask=column < end, other=0.0).to(tl.float32)
    at_inner = inner + ((split.to(tl.int64) * rows + row) * parts + part)[:, None] * most_rank
    for first in range(0, rank, RANKS):
        r = first + tl.arange(0, RANKS)
        at_up = up + ((slot * most_rank + r) * columns)[:, None] + column[None, :]
        w = tl.load(at_up, mask=(r < rank)[:, None] & (column < end)[None, :], other=0.0)
        v = tl.load(at_inner + r[None, :], mask=(split < splits)[:, None] & (r < rank)[None, :], other=0.0)
        sums += tl.sum(tl.sum(v, 0)[:, None] * w.to(tl.float32), 0)
    tl.store(to, sums.to(y.dtype.element_ty), mask=column < end)


@triton.jit(do_not_specialize=["rows"])
def _shrink_tile(
    x,
    slots,
    down,
    ranks,
    inner,
    rows,
    x_stride,
    inputs,
    count,
    parts,
    most_rank,
    TILE: tl.constexpr,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The same for neighbours, all inputs at once, slot after slot among them."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    blocks = tl.cdiv(most_rank, RANKS)
    part, first = tl.program_id(1) // blocks, tl.program_id(1) % blocks * RANKS
    left = tl.load(slots + row, mask=row < rows, other=-1).to(tl.int64)
    left = tl.where(left < count, left, -1)
    r = first + tl.arange(0, RANKS)
    at_x = x + row.to(tl.int64)[:, None] * x_stride
    slot = tl.max(left, 0)
    while slot >= 0:
        mine = left == slot
        rank = _rank(ranks, slot, part, parts, most_rank)
        if first < rank:
            at_down = down + (((slot * parts + part) * most_rank + r) * inputs)[None, :]
            sums = tl.zeros((TILE, RANKS), tl.float32)
            for begin in range(0, inputs, DEPTH):
                k = begin + tl.arange(0, DEPTH)
                v = tl.load(at_x + k[None, :], mask=mine[:, None] & (k < inputs)[None, :], other=0.0)
                w = tl.load(at_down + k[:, None], mask=(r < rank)[None, :] & (k < inputs)[:, None], other=0.0)
                sums = tl.dot(v, w, sums, input_precision="ieee")
            to = inner + ((row.to(tl.int64) * parts + part) * most_rank)[:, None] + r[None, :]
            tl.store(to, sums, mask=mine[:, None] & (r < rank)[None, :])
        left = tl.where(mine, -1, left)
        slot = tl.max(left, 0)


@triton.jit(do_not_specialize=["rows"])
def _expand_tile(
    y,
    slots,
    up,
    ranks,
    starts,
    inner,
    rows,
    y_stride,
    y_step,
    columns,
    count,
    parts,
    most_rank,
    TILE: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The same for neighbours, slot after slot and part after part among them."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    left = tl.load(slots + row, mask=row < rows, other=-1).to(tl.int64)
    left = tl.where(left < count, left, -1)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.max(left, 0)
    while slot >= 0:
        mine = left == slot
        for part in range(parts):
            begin, end = tl.load(starts + part), tl.load(starts + part + 1)
            own = (column >= begin) & (column < tl.minimum(end, columns))
            rank = tl.where(tl.sum(own.to(tl.int32), 0) > 0, _rank(ranks, slot, part, parts, most_rank), 0)
            sums = tl.zeros((TILE, COLUMNS), tl.float32)
            for first in range(0, rank, RANKS):
                r = first + tl.arange(0, RANKS)
                at = inner + ((row.to(tl.int64) * parts + part) * most_rank)[:, None] + r[None, :]
                v = tl.load(at, mask=mine[:, None] & (r < rank)[None, :], other=0.0)
                at_up = up + ((slot * most_rank + r) * columns)[:, None] + column[None, :]
                w = tl.load(at_up, mask=(r < rank)[:, None] & own[None, :], other=0.0)
                sums = tl.dot(v, w.to(tl.float32), sums, input_precision="ieee")
            # The end moves where the part has no rank: `own & (rank > 0)` is no mask for Triton's interpreter.
            known = mine[:, None] & (own & (column < tl.where(rank > 0, end, 0)))[None, :]
            to = y + row.to(tl.int64)[:, None] * y_stride + column.to(tl.int64)[None, :] * y_step
            before = tl.load(to, mask=known, other=0.0).to(tl.float32)
            tl.store(to, (before + sums).to(y.dtype.element_ty), mask=known)
        left = tl.where(mine, -1, left)
        slot = tl.max(left, 0)


def lora(y: Tensor, x: Tensor, slots: Tensor, down: Tensor, up: Tensor, ranks: Tensor, starts: Tensor) -> None:
    """As the reference; what it refuses is left out instead."""
    rows, columns = y.shape
    count, parts, most_rank, inputs = down.shape
    if not y.numel() or not down.numel():
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    slots, down, up, ranks, starts = (t.contiguous() for t in (slots, down, up, ranks, starts))
    are_few = rows <= _FEW_ROWS
    depth = min(_DEPTH, max(16, triton.next_power_of_2(inputs))) if are_few else 256 // x.element_size()
    splits = triton.cdiv(inputs, depth) if are_few else 1
    inner = torch.empty((splits, rows, parts, most_rank), dtype=torch.float32, device=y.device)
    shrunk = (x, slots, down, ranks, inner, rows, x.stride(0), inputs, count, parts, most_rank)
    expanded = (y, slots, up, ranks, starts, inner, rows, *y.stride(), columns, count, parts, most_rank)
    blocks = parts * triton.cdiv(most_rank, _RANKS)
    if are_few:
        shape = {"COLUMNS": _COLUMNS, "SPLITS": triton.next_power_of_2(splits)}
        both = {"RANKS": _RANKS} | overlapping(y)
        _shrink_row[(rows, blocks, splits)](*shrunk, DEPTH=depth, **both)
        _expand_row[(rows, parts * triton.cdiv(columns, _COLUMNS))](*expanded, splits, **shape, **both)
    else:
        tiles, shape = triton.cdiv(rows, _TILE), {"TILE": _TILE, "RANKS": _RANKS}
        _shrink_tile[(tiles, blocks)](*shrunk, **shape, DEPTH=depth, num_stages=4)
        _expand_tile[(tiles, triton.cdiv(columns, _TILE_COLUMNS))](*expanded, **shape, COLUMNS=_TILE_COLUMNS)
