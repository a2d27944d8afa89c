"""The kernels of paged attention: a list of tiles of queries, cut along their keys where that fills the GPU.

A program takes one entry of the list: some queries of a sequence, all query heads that share a head of keys, and a
chunk of the keys. How the list is cut follows from all lengths, which only the GPU knows, so each program counts them
and finds its entry; the grid, the same whatever they are, has room for every cut. What was cut a second kernel joins.
Ids and lengths that do not fit are not looked up: nothing outside a cache or table is read or written.
"""

import triton
import triton.language as tl

from bestiary_kernels.attention.paged.sweep import sweep

__all__ = ["attend", "join"]

#: Sequences that a program counts at a time.
_SEQUENCES = tl.constexpr(128)
#: Sizes of a chunk that are compared, a power of 2.
_CHOICES = tl.constexpr(8)
#: Partial results that a merging program reads at a time.
_JOINED = tl.constexpr(16)


@triton.jit
def _tiles(at, starts, lengths, tokens, sequences, reach, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of queries, and tiles of keys that each of them may see, of the sequences `at`."""
    there = at < sequences
    begin = tl.maximum(tl.load(starts + at, mask=there, other=0).to(tl.int32), 0)
    end = tl.minimum(tl.load(starts + at + 1, mask=there, other=0).to(tl.int32), tokens)
    keys = tl.minimum(tl.maximum(tl.load(lengths + at, mask=there, other=0).to(tl.int32), 0), reach)
    return (tl.maximum(end - begin, 0) + BLOCK_Q - 1) // BLOCK_Q, (keys + BLOCK_N - 1) // BLOCK_N


@triton.jit
def _chunk(
    starts, lengths, tokens, sequences, reach, extra, fill, base, OVER, BLOCK_Q, BLOCK_N
):  # fmt: skip
    """How many tiles of keys an entry of the list has at most, so that the last one ends as early as can be.

    The GPU takes `fill` entries at a time. What fills it once more than the list needs uncut, twice, and so on are the
    choices, none with more than `extra` new entries; that of the least time is taken, where beginning and joining an
    entry takes as long as `OVER` tiles. Whole numbers only: both kernels must choose the same.
    """
    total, top = tl.full((), 0, tl.int64), tl.full((), 0, tl.int32)
    for first in range(0, sequences, _SEQUENCES):
        at = first + tl.arange(0, _SEQUENCES)
        queries, keys = _tiles(at, starts, lengths, tokens, sequences, reach, BLOCK_Q, BLOCK_N)
        total += tl.sum(queries.to(tl.int64) * keys, 0)
        top = tl.maximum(top, tl.max(tl.where(queries > 0, keys, 0), 0))
    wanted = (base + tl.arange(0, _CHOICES)).to(tl.int64) * fill * top // tl.maximum(total, 1)
    wanted = tl.maximum(wanted, 1)  # chunks of the longest sequence
    choices = tl.maximum((top + wanted - 1) // wanted, (total + extra - 1) // extra)
    choices = tl.maximum(tl.minimum(choices, 1 << 30), 1).to(tl.int32)
    entries = tl.full((_CHOICES,), 0, tl.int32)
    for first in range(0, sequences, _SEQUENCES):
        at = first + tl.arange(0, _SEQUENCES)
        queries, keys = _tiles(at, starts, lengths, tokens, sequences, reach, BLOCK_Q, BLOCK_N)
        splits = tl.maximum((keys[:, None] + choices[None, :] - 1) // choices[None, :], 1)
        entries += tl.sum(queries[:, None] * splits, 0)
    entries = entries.to(tl.int64)
    # All are as long as the longest, or the lengths differ and the gaps are filled.
    alike = (entries + fill - 1) // fill * (choices + OVER)
    time = tl.minimum(alike, (total + entries * OVER) // fill + choices + OVER)
    # Of a minimum that no loop yields Triton 3.9 loses track: what depends on it, all keys, would then be loaded number
    # by number, and not ahead.
    chunk = 1 << 30
    for _ in range(0, sequences, 1 << 30):
        chunk = tl.minimum(chunk, tl.min(tl.where(time == tl.min(time, 0), choices, 1 << 30), 0))
    return chunk


@triton.jit
def _find(
    item, starts, lengths, tokens, sequences, reach, extra, fill, base, OVER, BLOCK_Q, BLOCK_N, SPLIT, JOINS
):  # fmt: skip
    """Where an entry of the list is: its sequence, its place there, that one's first slot of partial results, a chunk.

    `JOINS`: the list of tiles that were cut.
    """
    chunk = tl.full((), 1 << 30, tl.int32)
    if SPLIT:
        chunk = _chunk(starts, lengths, tokens, sequences, reach, extra, fill, base, OVER, BLOCK_Q, BLOCK_N)
    sequence, before, past, slot = 0, 0, 0, 0
    for first in range(0, sequences, _SEQUENCES):
        at = first + tl.arange(0, _SEQUENCES)
        queries, keys = _tiles(at, starts, lengths, tokens, sequences, reach, BLOCK_Q, BLOCK_N)
        splits = tl.maximum((keys + chunk - 1) // chunk, 1)
        partial = tl.where(splits > 1, queries * splits, 0)
        entries = queries * splits
        if JOINS:
            entries = tl.where(splits > 1, queries, 0)
        ends = before + tl.cumsum(entries, 0)
        is_past = (ends <= item) & (at < sequences)
        sequence += tl.sum(is_past.to(tl.int32), 0)
        past += tl.sum(tl.where(is_past, entries, 0), 0)
        slot += tl.sum(tl.where(is_past, partial, 0), 0)
        before += tl.sum(entries, 0)
    return sequence, item - past, slot, chunk


@triton.jit
def _sequence(at, starts, lengths, tokens, longest, reach, chunk, BLOCK_N):
    """A sequence's first query, its queries and keys, and into how many chunks the keys are cut."""
    begin = tl.maximum(tl.load(starts + at).to(tl.int32), 0)
    queries = tl.minimum(tl.load(starts + at + 1).to(tl.int32), tokens) - begin
    context = tl.minimum(tl.maximum(tl.load(lengths + at).to(tl.int32), 0), longest)
    tiles = (tl.minimum(context, reach) + BLOCK_N - 1) // BLOCK_N
    return begin, queries, context, tl.maximum((tiles + chunk - 1) // chunk, 1)


@triton.jit
def _span(first, context, sequence, real, lows, highs, visible, window, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr):
    """The keys that any row of a tile sees, from which to before which; its first query stands at `first`."""
    low, high = first * 0, context
    if CAUSAL:
        high = tl.minimum(context, first + BLOCK_Q)
        if window is not None:
            low = tl.maximum(first - window + 1, 0)
        if visible is not None:
            prefix = tl.load(visible + sequence).to(tl.int32)
            high = tl.where(first < prefix, tl.maximum(high, tl.minimum(prefix, context)), high)
            low = tl.where(first < prefix, 0, low)
    if lows is not None:
        low = tl.maximum(tl.min(tl.where(real, lows, context), 0), 0)
        high = tl.minimum(tl.max(tl.where(real, highs, 0), 0), context)
    return low, high


@triton.jit
def _pieces(x, real, CUT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):
    """The rows at `x`, up to CUT and from there on."""
    d = tl.arange(0, BLOCK_D)
    before = tl.load(x[:, None] + d[None, :], mask=real[:, None] & (d < CUT)[None, :], other=0.0)
    after = before
    if BLOCK_E > 0:
        e = CUT + tl.arange(0, BLOCK_E)
        after = tl.load(x[:, None] + e[None, :], mask=real[:, None] & (e < WIDTH)[None, :], other=0.0)
    return before, after


@triton.jit(do_not_specialize=["tokens", "sequences", "blocks", "pages", "reach", "extra", "fill", "base", "window"])
def attend(
    q, k_cache, v_cache, out, parts, sums, tables, starts, lengths, slopes, visible, ranges,
    q_strides, k_strides, v_strides, out_strides, scale, softcap, window,
    tokens, sequences, blocks, pages, reach, extra, fill, base,
    CAUSAL: tl.constexpr, SHARED: tl.constexpr, SPLIT: tl.constexpr, FOLDS: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr, CUT: tl.constexpr, VALUES: tl.constexpr, OVER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr,
) -> None:  # fmt: skip
    """One entry of the list."""
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    sequence, inner, slot, chunk = _find(
        tl.program_id(0),
        starts,
        lengths,
        tokens,
        sequences,
        reach,
        extra,
        fill,
        base,
        OVER,
        BLOCK_Q,
        BLOCK_N,
        SPLIT,
        False,
    )
    if sequence >= sequences:
        return
    begin, queries, context, splits = _sequence(sequence, starts, lengths, tokens, pages * PAGE, reach, chunk, BLOCK_N)
    tile = (queries - 1) // BLOCK_Q - inner // splits  # those with the most keys begin first
    row, head_tile = tl.arange(0, BLOCK_M), tl.program_id(1) % HEAD_TILES
    kv_head = (tl.program_id(1) // HEAD_TILES).to(tl.int64)
    query, member = tile * BLOCK_Q + row // HEADS, head_tile * HEADS + row % HEADS
    real = (row < BLOCK_Q * HEADS) & (query < queries) & (member < GROUP)
    head, token = kv_head * GROUP + member, (begin + query).to(tl.int64)
    lows, highs, slope, prefix = None, None, None, None
    if ranges is not None:
        lows = tl.load(ranges + token * 2, mask=real, other=0).to(tl.int32)
        highs = tl.load(ranges + token * 2 + 1, mask=real, other=0).to(tl.int32)
    if slopes is not None:
        slope = tl.load(slopes + head, mask=real, other=0.0)
    if visible is not None:
        prefix = tl.load(visible + sequence).to(tl.int32)
    first = context - queries + tile * BLOCK_Q
    low, high = _span(first, context, sequence, real, lows, highs, visible, window, CAUSAL, BLOCK_Q)
    start = low // BLOCK_N * BLOCK_N
    share = (tl.maximum(high - start, 0) + BLOCK_N * splits - 1) // (BLOCK_N * splits) * BLOCK_N
    start += inner % splits * share
    end = tl.minimum(high, start + share)
    q0, q1 = _pieces(q + token * q_strides[0] + head * q_strides[1], real, CUT, WIDTH, BLOCK_D, BLOCK_E)
    largest, weight, mixed = sweep(
        start, end, low, high, first, q0, q1, context - queries + query, lows, highs, slope, prefix,
        k_cache + kv_head * k_strides[1], v_cache + kv_head * v_strides[1], tables + sequence.to(tl.int64) * pages,
        k_strides, v_strides, blocks, scale, softcap, window,
        CAUSAL, SHARED, FOLDS, PAGE, WIDTH, CUT, VALUES, BLOCK_M, BLOCK_Q, BLOCK_N, BLOCK_D, BLOCK_E, BLOCK_V,
    )  # fmt: skip
    v = tl.arange(0, BLOCK_V)
    mask = real[:, None] & (v < VALUES)[None, :]
    if splits == 1:
        mixed /= tl.where(weight == 0, 1.0, weight)[:, None]  # what sees no key gets zeros
        at = out + token * out_strides[0] + head * out_strides[1]
        tl.store(at[:, None] + v[None, :], mixed.to(out.dtype.element_ty), mask=mask)
    elif SPLIT:
        ROWS: tl.constexpr = BLOCK_Q * HEADS
        place = ((slot + inner).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * ROWS + row
        tl.store(parts + place[:, None] * VALUES + v[None, :], mixed, mask=mask)
        tl.store(sums + place * 2, largest, mask=real)
        tl.store(sums + place * 2 + 1, weight, mask=real)


@triton.jit(do_not_specialize=["tokens", "sequences", "pages", "reach", "extra", "fill", "base"])
def join(
    parts, sums, out, starts, lengths, out_strides, tokens, sequences, pages, reach, extra, fill, base,
    GROUP: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr, VALUES: tl.constexpr, OVER: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
) -> None:  # fmt: skip
    """The partial results of one tile that was cut: of every so many-th row."""
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    sequence, tile, slot, chunk = _find(
        tl.program_id(0),
        starts,
        lengths,
        tokens,
        sequences,
        reach,
        extra,
        fill,
        base,
        OVER,
        BLOCK_Q,
        BLOCK_N,
        True,
        True,
    )
    if sequence >= sequences:
        return
    begin, queries, _, splits = _sequence(sequence, starts, lengths, tokens, pages * PAGE, reach, chunk, BLOCK_N)
    slot += tile * splits
    tile = (queries - 1) // BLOCK_Q - tile
    head_tile, kv_head = tl.program_id(1) % HEAD_TILES, tl.program_id(1) // HEAD_TILES
    v = tl.arange(0, BLOCK_V)
    ROWS: tl.constexpr = BLOCK_Q * HEADS
    for row in range(tl.program_id(2), ROWS, tl.num_programs(2)):
        query, member = tile * BLOCK_Q + row // HEADS, head_tile * HEADS + row % HEADS
        if (query < queries) & (member < GROUP):
            largest = tl.full((), float("-inf"), tl.float32)
            weight = tl.full((), 0.0, tl.float32)
            mixed = tl.full((BLOCK_V,), 0.0, tl.float32)
            for begun in range(0, splits, _JOINED):
                split = begun + tl.arange(0, _JOINED)
                there = split < splits
                place = ((slot + split).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * ROWS + row
                tops = tl.load(sums + place * 2, mask=there, other=float("-inf"))
                new = tl.maximum(largest, tl.max(tops, 0))
                level = tl.where(new == float("-inf"), 0.0, new)
                fade, shares = tl.exp2(largest - level), tl.exp2(tops - level)
                mask = there[:, None] & (v < VALUES)[None, :]
                values = tl.load(parts + place[:, None] * VALUES + v[None, :], mask=mask, other=0.0)
                weights = shares * tl.load(sums + place * 2 + 1, mask=there, other=0.0)
                mixed = mixed * fade + tl.sum(values * shares[:, None], 0)
                weight = weight * fade + tl.sum(weights, 0)
                largest = new
            mixed /= tl.where(weight == 0, 1.0, weight)
            at = out + (begin + query).to(tl.int64) * out_strides[0] + (kv_head * GROUP + member) * out_strides[1]
            tl.store(at + v, mixed.to(out.dtype.element_ty), mask=v < VALUES)
