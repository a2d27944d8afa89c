"""Where the work of paged attention's programs lies, which follows from all lengths: each program counts them itself.

All programs, of both kernels, must come to the same: whole numbers only.
"""

import triton
import triton.language as tl

__all__ = ["CHOICES", "cut_tile", "entry", "part", "pieces", "sequence_at"]

#: Sizes of a chunk that are compared, a power of 2.
CHOICES = tl.constexpr(8)


@triton.jit
def _tiles(starts, lengths, tokens, sequences, reach, BLOCK_S: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N):
    """Of every sequence the tiles of queries, and the tiles of keys that each of them may see."""
    at = tl.arange(0, BLOCK_S)
    there = at < sequences
    begin = tl.maximum(tl.load(starts + at, mask=there, other=0).to(tl.int32), 0)
    end = tl.minimum(tl.load(starts + at + 1, mask=there, other=0).to(tl.int32), tokens)
    keys = tl.minimum(tl.maximum(tl.load(lengths + at, mask=there, other=0).to(tl.int32), 0), reach)
    return (tl.maximum(end - begin, 0) + BLOCK_Q - 1) // BLOCK_Q, (keys + BLOCK_N - 1) // BLOCK_N


@triton.jit
def sequence_at(at, starts, lengths, tokens, longest, reach, BLOCK_N):
    """A sequence's first query, its queries, its keys, and the tiles of keys that one of its tiles may see."""
    begin = tl.maximum(tl.load(starts + at).to(tl.int32), 0)
    queries = tl.maximum(tl.minimum(tl.load(starts + at + 1).to(tl.int32), tokens) - begin, 0)
    context = tl.minimum(tl.maximum(tl.load(lengths + at).to(tl.int32), 0), longest)
    return begin, queries, context, tl.maximum((tl.minimum(context, reach) + BLOCK_N - 1) // BLOCK_N, 1)


@triton.jit
def part(
    program, programs, starts, lengths, tokens, sequences, reach, OVER, BLOCK_N, BLOCK_S: tl.constexpr
):  # fmt: skip
    """One query a tile: all programs take equal parts of all tiles of keys, one sequence's after the other's.

    Beginning costs as much as `OVER` tiles, which stand before those of each query. Returns how long a part is, where
    all end, and the sequence that the program begins in, with where that one begins.
    """
    queries, keys = _tiles(starts, lengths, tokens, sequences, reach, BLOCK_S, 1, BLOCK_N)
    costs = queries * (tl.maximum(keys, 1) + OVER)
    total = tl.sum(costs, 0)
    size = (total + programs - 1) // programs
    is_past = (tl.cumsum(costs, 0) <= program * size) & (tl.arange(0, BLOCK_S) < sequences)
    return size, total, tl.sum(is_past.to(tl.int32), 0), tl.sum(tl.where(is_past, costs, 0), 0)


@triton.jit
def pieces(
    token, programs, starts, lengths, tokens, sequences, reach, OVER, BLOCK_N, BLOCK_S: tl.constexpr
):  # fmt: skip
    """A query's sequence, its place there, and which programs' parts it lies in, from the first to the last."""
    queries, keys = _tiles(starts, lengths, tokens, sequences, reach, BLOCK_S, 1, BLOCK_N)
    keys = tl.maximum(keys, 1)
    costs = queries * (keys + OVER)
    size = tl.maximum((tl.sum(costs, 0) + programs - 1) // programs, 1)
    ends, at = tl.cumsum(queries, 0), tl.arange(0, BLOCK_S)
    is_past = (ends <= token) & (at < sequences)
    sequence = tl.sum(is_past.to(tl.int32), 0)
    tile = token - tl.sum(tl.where(is_past, queries, 0), 0)
    own = tl.sum(tl.where(at == sequence, keys, 0), 0)
    begin = tl.sum(tl.where(is_past, costs, 0), 0) + tile * (own + OVER) + OVER
    return sequence, tile, tl.maximum(begin // size, 0), tl.minimum((begin + own - 1) // size, programs - 1)


@triton.jit
def _chunk(queries, keys, sequences, extra, fill, base, OVER):
    """How many tiles of keys an entry of the list has at most, so that the last one ends as early as can be.

    The GPU takes `fill` entries at a time. What fills it once more than the list needs uncut, twice, and so on are the
    choices, none with more than `extra` new entries; that of the least time is taken, where beginning and joining an
    entry takes as long as `OVER` tiles. All numbers fit into 32 bits, which the host sees to: every program does this.
    """
    total = tl.sum(queries * keys, 0)
    top = tl.max(tl.where(queries > 0, keys, 0), 0)
    wanted = tl.maximum((base + tl.arange(0, CHOICES)) * fill * top // tl.maximum(total, 1), 1)
    # Of the longest sequence.
    choices = tl.maximum((top + wanted - 1) // wanted, tl.maximum((total + extra - 1) // extra, 1))
    splits = tl.maximum((keys[:, None] + choices[None, :] - 1) // choices[None, :], 1)
    entries = tl.sum(queries[:, None] * splits, 0)
    # All are as long as the longest, or the lengths differ and the gaps are filled.
    alike = (entries + fill - 1) // fill * (choices + OVER)
    time = tl.minimum(alike, (total + entries * OVER) // fill + choices + OVER)
    return tl.min(tl.where(time == tl.min(time, 0), choices, 1 << 30), 0)


@triton.jit
def _found(item, queries, splits, entries, sequences, BLOCK_S: tl.constexpr):
    """The sequence of an item of a list, its place there, and the sequence's first slot of partial results."""
    is_past = (tl.cumsum(entries, 0) <= item) & (tl.arange(0, BLOCK_S) < sequences)
    slots = tl.where(is_past & (splits > 1), queries * splits, 0)
    past = tl.sum(tl.where(is_past, entries, 0), 0)
    return tl.sum(is_past.to(tl.int32), 0), item - past, tl.sum(slots, 0)


@triton.jit
def entry(
    item, starts, lengths, tokens, sequences, reach, extra, fill, base, OVER, BLOCK_Q, BLOCK_N, BLOCK_S: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """More queries a tile: an entry's sequence, its place there, that one's first slot, and how long a chunk is."""
    queries, keys = _tiles(starts, lengths, tokens, sequences, reach, BLOCK_S, BLOCK_Q, BLOCK_N)
    chunk = tl.full((), 1 << 30, tl.int32)
    if SPLIT:
        chunk = _chunk(queries, keys, sequences, extra, fill, base, OVER)
    splits = tl.maximum((keys + chunk - 1) // chunk, 1)
    sequence, inner, slot = _found(item, queries, splits, queries * splits, sequences, BLOCK_S)
    return sequence, inner, slot, chunk


@triton.jit
def cut_tile(
    item, starts, lengths, tokens, sequences, reach, extra, fill, base, OVER, BLOCK_Q, BLOCK_N, BLOCK_S: tl.constexpr
):  # fmt: skip
    """Of the tiles that were cut one's sequence, its place there, that one's first slot, and how long a chunk is."""
    queries, keys = _tiles(starts, lengths, tokens, sequences, reach, BLOCK_S, BLOCK_Q, BLOCK_N)
    chunk = _chunk(queries, keys, sequences, extra, fill, base, OVER)
    splits = tl.maximum((keys + chunk - 1) // chunk, 1)
    cut = tl.where(splits > 1, queries, 0)
    sequence, tile, slot = _found(item, queries, splits, cut, sequences, BLOCK_S)
    return sequence, tile, slot, chunk
