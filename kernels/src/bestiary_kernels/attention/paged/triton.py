"""The kernels of paged attention: tiles of queries, cut along their keys where that fills the GPU.

A tile is some queries of a sequence and all query heads that share a head of keys; a program takes pieces of tiles,
each a run of keys. How tiles are cut follows from all lengths, which only the GPU knows; the grid is the same whatever
they are. Where sequences have one query, as many programs as the GPU takes at once share the keys of all evenly; else
each takes one entry of a list that has room for every cut. What was cut a second kernel joins.
Ids and lengths that do not fit are not looked up: nothing outside a cache or table is read or written.
"""

import triton
import triton.language as tl

from bestiary_kernels.attention.plan.triton import cut_tile, entry, part, pieces, sequence_at
from bestiary_kernels.attention.sweep.triton import sweep
from bestiary_kernels.overlap.triton import release_next, wait_for_last

__all__ = ["attend", "join"]

_LOG2E = tl.constexpr(1.4426950408889634)
#: Partial results that a merging program reads at a time.
_JOINED = tl.constexpr(16)


@triton.jit
def _views(
    first, position, context, token, real, sequence, visible, ranges, window,
    CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """From which to before which key each row sees, then any of them; and before which key all of them see all.

    The first query of a tile stands at `first`. Rows that are nobody's may see more.
    """
    lows, low, whole = position * 0, first * 0, context
    highs, high = lows + context, context
    if CAUSAL:
        highs, high, whole = position + 1, tl.minimum(context, first + BLOCK_Q), first + 1
        if window is not None:
            lows, low = position - window + 1, tl.maximum(first - window + 1, 0)
        if visible is not None:
            prefix = tl.minimum(tl.load(visible + sequence).to(tl.int32), context)
            highs, high = tl.where(position < prefix, prefix, highs), tl.maximum(high, prefix)
            if window is not None:
                lows, low = tl.where(position < prefix, 0, lows), tl.where(first < prefix, 0, low)
    if ranges is not None:
        lows = tl.load(ranges + token * 2, mask=real, other=0).to(tl.int32)
        highs = tl.minimum(tl.load(ranges + token * 2 + 1, mask=real, other=0).to(tl.int32), context)
        low = tl.maximum(tl.min(tl.where(real, lows, context), 0), 0)
        high = tl.max(tl.where(real, highs, 0), 0)
    return lows, highs, low, high, whole


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


@triton.jit
def _piece(
    column, sequence, begin, queries, context, tile, first_piece, end_piece, all_pieces, slot,
    q, k_cache, v_cache, out, parts, sums, tables, slopes, visible, ranges, sinks,
    q_strides, k_strides, v_strides, out_strides, scale, softcap, window, blocks, pages,
    EVEN: tl.constexpr, CAUSAL: tl.constexpr, SHARED: tl.constexpr, SPLIT: tl.constexpr, FOLDS: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr, CUT: tl.constexpr,
    VALUES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A tile of queries and some of the pieces of its keys: the result if these are all, else a partial one."""
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    row, head_tile = tl.arange(0, BLOCK_M), column % HEAD_TILES
    kv_head = (column // HEAD_TILES).to(tl.int64)
    query, member = tile * BLOCK_Q + row // HEADS, head_tile * HEADS + row % HEADS
    real = (row < BLOCK_Q * HEADS) & (query < queries) & (member < GROUP)
    head, token = kv_head * GROUP + member, (begin + query).to(tl.int64)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + head, mask=real, other=0.0)
    before = context - queries
    lows, highs, low, high, whole = _views(
        before + tile * BLOCK_Q, before + query, context, token, real, sequence, visible, ranges, window,
        CAUSAL, BLOCK_Q,
    )  # fmt: skip
    start, length = low // BLOCK_N * BLOCK_N, BLOCK_N  # of a piece; of one query's keys each is a tile
    if not EVEN:
        length = (tl.maximum(high - start, 0) + BLOCK_N * all_pieces - 1) // (BLOCK_N * all_pieces) * BLOCK_N
    end = tl.where(end_piece == all_pieces, high, tl.minimum(high, start + end_piece * length))
    start += first_piece * length
    q0, q1 = _pieces(q + token * q_strides[0] + head * q_strides[1], real, CUT, WIDTH, BLOCK_D, BLOCK_E)
    largest, weight, mixed = sweep(
        start, end, low, high, whole, q0, q1, lows, highs, slope,
        k_cache + kv_head * k_strides[1], v_cache + kv_head * v_strides[1], tables + sequence.to(tl.int64) * pages,
        k_strides, v_strides, blocks, scale, softcap, window is not None or ranges is not None,
        SHARED, FOLDS, PAGE, WIDTH, CUT, VALUES, BLOCK_M, BLOCK_Q, BLOCK_N, BLOCK_D, BLOCK_E, BLOCK_V,
    )  # fmt: skip
    v = tl.arange(0, BLOCK_V)
    mask = real[:, None] & (v < VALUES)[None, :]
    if end_piece - first_piece == all_pieces:
        if sinks is not None:
            sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * _LOG2E
            top = tl.maximum(largest, sink)
            fade = tl.exp2(largest - top)
            weight, mixed = weight * fade + tl.exp2(sink - top), mixed * fade[:, None]
        mixed /= tl.where(weight == 0, 1.0, weight)[:, None]  # what sees no key gets zeros
        at = out + token * out_strides[0] + head * out_strides[1]
        tl.store(at[:, None] + v[None, :], mixed.to(out.dtype.element_ty), mask=mask)
    elif SPLIT:
        ROWS: tl.constexpr = BLOCK_Q * HEADS
        place = (slot.to(tl.int64) * COLUMNS + column) * ROWS + row
        tl.store(parts + place[:, None] * VALUES + v[None, :], mixed, mask=mask)
        tl.store(sums + place * 2, largest, mask=real)
        tl.store(sums + place * 2 + 1, weight, mask=real)


@triton.jit(do_not_specialize=["tokens", "sequences", "blocks", "pages", "reach", "extra", "fill", "base", "window"])
def attend(
    q, k_cache, v_cache, out, parts, sums, tables, starts, lengths, slopes, visible, ranges, sinks,
    q_strides, k_strides, v_strides, out_strides, scale, softcap, window,
    tokens, sequences, blocks, pages, reach, extra, fill, base,
    EVEN: tl.constexpr, CAUSAL: tl.constexpr, SHARED: tl.constexpr, SPLIT: tl.constexpr, FOLDS: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr, CUT: tl.constexpr,
    VALUES: tl.constexpr, COLUMNS: tl.constexpr, OVER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:  # fmt: skip
    """The program's part of all keys, or its entry of the list; the longest entries of all heads begin first."""
    release_next(OVERLAPS)
    wait_for_last(OVERLAPS)
    program, column = tl.program_id(0) // COLUMNS, tl.program_id(0) % COLUMNS
    if EVEN:
        size, total, sequence, past = part(
            program, tl.num_programs(0) // COLUMNS, starts, lengths, tokens, sequences, reach, OVER, BLOCK_N, BLOCK_S
        )
        at, until = program * size, tl.minimum(program * size + size, total)
        while (at < until) & (sequence < sequences):
            begin, queries, context, tiles = sequence_at(
                sequence, starts, lengths, tokens, pages * PAGE, reach, BLOCK_N
            )
            tile = (at - past) // (tiles + OVER)
            if tile < queries:
                origin = past + tile * (tiles + OVER) + OVER
                piece = tl.minimum(tl.maximum(program * size - origin, 0), tiles)
                end_piece = tl.minimum(tl.maximum(until - origin, 0), tiles)
                if piece < end_piece:
                    # A program has at most one piece of a tile that began before, and one of a tile that goes on.
                    slot = 2 * program + (piece == 0).to(tl.int32)
                    _piece(
                        column, sequence, begin, queries, context, tile, piece, end_piece, tiles, slot,
                        q, k_cache, v_cache, out, parts, sums, tables, slopes, visible, ranges, sinks,
                        q_strides, k_strides, v_strides, out_strides, scale, softcap, window, blocks, pages,
                        EVEN, CAUSAL, SHARED, SPLIT, FOLDS, GROUP, HEADS, PAGE, WIDTH, CUT, VALUES,
                        COLUMNS, BLOCK_M, BLOCK_Q, BLOCK_N, BLOCK_D, BLOCK_E, BLOCK_V,
                    )  # fmt: skip
                at = origin + tiles
            else:
                past += queries * (tiles + OVER)
                sequence += 1
    else:
        sequence, inner, slot, chunk = entry(
            program, starts, lengths, tokens, sequences, reach, extra, fill, base, OVER, BLOCK_Q, BLOCK_N, BLOCK_S,
            SPLIT,
        )  # fmt: skip
        if sequence < sequences:
            begin, queries, context, tiles = sequence_at(
                sequence, starts, lengths, tokens, pages * PAGE, reach, BLOCK_N
            )
            splits = (tiles + chunk - 1) // chunk
            tile = (queries - 1) // BLOCK_Q - inner // splits  # those with the most keys begin first
            _piece(
                column, sequence, begin, queries, context, tile, inner % splits, inner % splits + 1, splits,
                slot + inner,
                q, k_cache, v_cache, out, parts, sums, tables, slopes, visible, ranges, sinks,
                q_strides, k_strides, v_strides, out_strides, scale, softcap, window, blocks, pages,
                EVEN, CAUSAL, SHARED, SPLIT, FOLDS, GROUP, HEADS, PAGE, WIDTH, CUT, VALUES,
                COLUMNS, BLOCK_M, BLOCK_Q, BLOCK_N, BLOCK_D, BLOCK_E, BLOCK_V,
            )  # fmt: skip


@triton.jit
def _join(
    first, stop, slot, row, sink, parts, sums, ROWS: tl.constexpr, VALUES: tl.constexpr, BLOCK_V: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """One row of the partial results in the slot, and in every so many-th from `first` on; a sink is one more."""
    v = tl.arange(0, BLOCK_V)
    largest = tl.full((), -3.0e38, tl.float32)
    weight = tl.full((), 0.0, tl.float32)
    if sink is not None:
        largest, weight = sink.to(tl.float32) * _LOG2E, weight + 1.0
    mixed = tl.full((BLOCK_V,), 0.0, tl.float32)
    for begun in range(first, stop, _JOINED):
        piece = begun + tl.arange(0, _JOINED)
        there = piece < stop
        place = tl.where(piece == first, slot, piece * STEP).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        place = place * ROWS + row
        tops = tl.load(sums + place * 2, mask=there, other=float("-inf"))
        new = tl.maximum(largest, tl.max(tops, 0))
        fade, shares = tl.exp2(largest - new), tl.exp2(tops - new)
        mask = there[:, None] & (v < VALUES)[None, :]
        values = tl.load(parts + place[:, None] * VALUES + v[None, :], mask=mask, other=0.0)
        weights = shares * tl.load(sums + place * 2 + 1, mask=there, other=0.0)
        mixed = mixed * fade + tl.sum(values * shares[:, None], 0)
        weight = weight * fade + tl.sum(weights, 0)
        largest = new
    return mixed / tl.where(weight == 0, 1.0, weight)


@triton.jit(do_not_specialize=["tokens", "sequences", "pages", "reach", "extra", "fill", "base", "programs"])
def join(
    parts, sums, out, starts, lengths, sinks, out_strides, tokens, sequences, pages, reach, extra, fill, base, programs,
    EVEN: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr, VALUES: tl.constexpr,
    OVER: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:  # fmt: skip
    """The partial results of one tile that was cut: of every so many-th row."""
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    ROWS: tl.constexpr = BLOCK_Q * HEADS
    release_next(OVERLAPS)
    wait_for_last(OVERLAPS)
    # A piece is a program's, which has two slots, and the later one for the first piece of a tile; or it is a slot.
    STEP: tl.constexpr = 2 if EVEN else 1
    if EVEN:
        sequence, tile, first, last = pieces(
            tl.program_id(0), programs, starts, lengths, tokens, sequences, reach, OVER, BLOCK_N, BLOCK_S
        )
        if (sequence >= sequences) | (first >= last):
            return
        begin, queries, _, _ = sequence_at(sequence, starts, lengths, tokens, pages * PAGE, reach, BLOCK_N)
        stop, slot = last + 1, 2 * first + 1
    else:
        sequence, tile, slot, chunk = cut_tile(
            tl.program_id(0), starts, lengths, tokens, sequences, reach, extra, fill, base, OVER, BLOCK_Q, BLOCK_N,
            BLOCK_S,
        )  # fmt: skip
        if sequence >= sequences:
            return
        begin, queries, _, tiles = sequence_at(sequence, starts, lengths, tokens, pages * PAGE, reach, BLOCK_N)
        splits = (tiles + chunk - 1) // chunk
        slot += tile * splits
        first, stop = slot, slot + splits
        tile = (queries - 1) // BLOCK_Q - tile
    head_tile, kv_head = tl.program_id(1) % HEAD_TILES, tl.program_id(1) // HEAD_TILES
    v = tl.arange(0, BLOCK_V)
    for row in range(tl.program_id(2), ROWS, tl.num_programs(2)):
        query, member = tile * BLOCK_Q + row // HEADS, head_tile * HEADS + row % HEADS
        if (query < queries) & (member < GROUP):
            sink = None
            if sinks is not None:
                sink = tl.load(sinks + kv_head * GROUP + member)
            mixed = _join(first, stop, slot, row, sink, parts, sums, ROWS, VALUES, BLOCK_V, STEP)
            at = out + (begin + query).to(tl.int64) * out_strides[0] + (kv_head * GROUP + member) * out_strides[1]
            tl.store(at + v, mixed.to(out.dtype.element_ty), mask=v < VALUES)
