"""Launches the kernels over pages: chooses tiles and grids from what the host knows, and looks at no number of the GPU.

All lengths stay on the GPU, so a launch can be recorded in a CUDA graph: the grid and the memory for partial results
follow from how many tokens, sequences and heads there are, and from how long a table of blocks is.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from bestiary_kernels.attention.paged.triton import attend, join
from bestiary_kernels.attention.plan.triton import CHOICES
from bestiary_kernels.overlap.triton import overlapping

__all__ = ["over_pages", "paged_attention"]

_LOG2E = 1.4426950408889634
#: Times that cutting may fill the GPU: more would even out the end better, and spend more on beginnings. Of tiles with
#: many rows there are enough without, mostly, and programs that find nothing to do delay those that do.
_WAVES, _WAVES_OF_MANY_ROWS = 8, 2
#: Times that tiles as long as the longest fill the GPU if cutting them would gain nothing.
_PLENTY = 3
#: Most bytes of partial results.
_WORKSPACE = 64 << 20
#: Programs a multiprocessor that join what was cut, at most.
_JOINERS = 16
#: Multiprocessors of the machine that the interpreter plays.
_INTERPRETED = 1


class _Tile(NamedTuple):
    """Rows and keys of a tile, how a program computes it, and how many run on a multiprocessor at once."""

    rows: int
    keys: int
    warps: int
    stages: int
    busy: int

    @property
    def registers(self) -> int:
        """Of a thread, that as many programs find room: a multiprocessor has 65,536, and gives them out by eights."""
        return min(255, 65536 // (32 * self.warps * self.busy) // 8 * 8)


class _Plan(NamedTuple):
    """How the work becomes that of `programs`, for each of `columns` parts of the heads.

    They take equal parts of it if `is_even`, else entries of a list that may be cut into `extra` ones more than it has.
    """

    is_even: bool
    is_cut: bool
    queries: int
    heads: int
    columns: int
    programs: int
    extra: int
    fill: int
    base: int
    slots: int
    joined: int
    joiners: int
    reach: int


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    visible: Tensor | None = None,
    causal: bool = True,
    ranges: Tensor | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As the reference, into `out` if that is given."""
    out = q.new_empty(*q.shape[:2], v_cache.shape[3]) if out is None else out
    batch = (block_tables, query_starts, context_lens)
    over_pages(q, k_cache, v_cache, *batch, scale, out, window, softcap, slopes, visible, causal, ranges, sinks)
    return out


def over_pages(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    visible: Tensor | None = None,
    causal: bool = True,
    ranges: Tensor | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Attention over caches [blocks, Hk, B, D] into `out`; without values a key's first numbers are its value."""
    tokens, q_heads, width = q.shape
    blocks, kv_heads, page, _ = k_cache.shape
    (sequences, pages), values, group = block_tables.shape, out.shape[2], q_heads // kv_heads
    if not out.numel() or not sequences:
        return
    if q.dtype is not k_cache.dtype or q.stride(2) != 1:
        q = (q if q.dtype is k_cache.dtype else q.float()).contiguous()
    tile = _tile(tokens, sequences, group, max(width, values), q.itemsize)
    seen = window if window is not None and visible is None else pages * page  # a prefix may be any length
    pages = pages if blocks else 0  # of an empty cache nothing is read
    plan = _plan(tile, tokens, sequences, group, kv_heads, values, min(pages * page, seen + tile.rows), q.device)
    cut, block_d, block_e = _cut(width, values if v_cache is None else None)
    rows = plan.queries * plan.heads
    parts, sums = (
        torch.empty(plan.slots * plan.columns * rows * n, dtype=torch.float32, device=q.device) for n in (values, 2)
    )
    # Beginning takes as long as a tile of keys or two, and what is written and read again as long as reading as much.
    over = 2 + 8 * rows * values // (tile.keys * (width + (0 if v_cache is None else values)) * k_cache.itemsize)
    starts, lengths = query_starts.contiguous(), context_lens.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    given = (None if x is None else x.contiguous() for x in (slopes, visible, ranges))
    v = k_cache if v_cache is None else v_cache
    sizes = (plan.reach, plan.extra, plan.fill, plan.base)
    shape = {"EVEN": plan.is_even, "GROUP": group, "HEADS": plan.heads, "PAGE": page, "VALUES": values, "OVER": over}
    shape |= {"BLOCK_Q": plan.queries, "BLOCK_N": tile.keys, "BLOCK_V": _power(values), "BLOCK_S": _counted(sequences)}
    shape |= overlapping(q)
    attend[(plan.programs * plan.columns,)](
        q, k_cache, v, out, parts, sums, block_tables.contiguous(), starts, lengths, *given, sinks,
        q.stride()[:2], k_cache.stride()[:3], v.stride()[:3], out.stride()[:2],
        # Weights are powers of 2; what is capped is divided first.
        scale * _LOG2E if softcap is None else scale / softcap, None if softcap is None else softcap * _LOG2E, window,
        tokens, sequences, blocks, pages, *sizes,
        CAUSAL=causal, SHARED=v_cache is None, SPLIT=plan.is_cut,
        FOLDS=scale > 0 and softcap is None and slopes is None, WIDTH=width, CUT=cut,
        COLUMNS=plan.columns, BLOCK_M=tile.rows, BLOCK_D=block_d, BLOCK_E=block_e, **shape,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    if plan.is_cut:
        join[(plan.joined, plan.columns, plan.joiners)](
            parts, sums, out, starts, lengths, sinks, out.stride()[:2], tokens, sequences, pages, *sizes, plan.programs,
            **shape, num_warps=max(1, _power(values) // 128),
        )  # fmt: skip


def _tile(tokens: int, sequences: int, group: int, width: int, size: int) -> _Tile:
    """The tile for queries that have `group` rows each, of numbers of `size` bytes.

    By what the compiler says of registers and shared memory, and by what an H100 and an H200 took: two or three
    programs a multiprocessor where memory is what is waited for, one where it is arithmetic. Ids of blocks are loaded
    before the keys that they lead to, so that 5 stages mean two tiles of keys on their way, and 3 mean one.
    """
    # Without more tokens than sequences each has about one; else one of them may have all that are more.
    rows = max(16, _power(group if tokens <= sequences else (tokens - sequences + 1) * group))
    if size > 2:  # no tensor cores: the registers hold little more than what is summed up
        return _Tile(min(rows, 32), 32, 4, 3, 2) if width <= 128 else _Tile(16, 16, 4, 3, 3)
    if width > 256:  # latent rows
        return _Tile(16, 32, 4, 5, 2) if rows == 16 else _Tile(min(rows, 64), 32, 8, 3, 1)
    if rows <= 32:
        return _Tile(rows, 32, 4, 5, 3 if rows == 16 else 2) if width > 128 else _Tile(rows, 64, 4, 3, 3)
    if rows > 64 and tokens * group >= 128 * sequences:
        if width <= 64:
            return _Tile(128, 64, 4, 5, 2)
        return _Tile(128, 64, 8, 3, 2 if width <= 128 else 1)
    return _Tile(64, 32, 8, 3, 1) if width > 128 else _Tile(64, 64, 4, 3, 2)


def _plan(
    tile: _Tile, tokens: int, sequences: int, group: int, kv_heads: int, values: int, reach: int, device: torch.device
) -> _Plan:
    """How the list may be cut; `reach` is how many keys a tile sees at most."""
    heads = -(-group // -(-group // tile.rows))  # those that do not fit into one tile are spread evenly
    is_even = tokens <= sequences  # each has about one query
    queries = 1 if is_even else tile.rows // heads
    columns = kv_heads * -(-group // heads)
    tiles = tokens if is_even else tokens // queries + sequences
    processors = _processors(device)
    fill = max(1, tile.busy * processors // columns)
    # Cut tiles become fewer than two entries for each that cutting adds. Few tiles can be cut so that they fill the GPU
    # once; only of many it takes several times to come out even, and programs that find nothing to do cost time too.
    room = _WORKSPACE // (8 * columns * queries * heads * values)
    waves = _WAVES if tile.rows < 128 else _WAVES_OF_MANY_ROWS
    extra = max(1, min(-(-waves * tiles // fill) * fill, waves * fill, room))
    base, steps = -(-tiles // fill), -(-reach // tile.keys)
    is_full = _is_full(
        -(-tokens // queries), fill, waves, min(1.0, tokens / (sequences * max(reach, 1))), sequences == 1
    )
    is_small = (base + CHOICES.value) * fill * steps < 1 << 31  # of what programs count with
    is_cut = steps > 1 and (is_even or (is_small and not is_full))
    programs = fill if is_even else tiles + (extra if is_cut else 0)
    joined = tiles if is_even else min(extra, tiles)
    joiners = max(1, min(queries * heads, _JOINERS * processors // (columns * joined)))
    slots = 2 * (programs if is_even else extra) if is_cut else 0
    return _Plan(
        is_even, is_cut, queries, heads, columns, programs, extra, fill, base, slots, joined, joiners, reach
    )  # fmt: skip


def _is_full(tiles: int, fill: int, waves: int, share: float, is_alone: bool) -> bool:
    """Whether tiles of queries keep the GPU busy uncut: that spares their programs a twelfth of their time.

    So it is where an average sequence's new tokens are a `share` of the longest tile's keys that makes even that tile
    short beside what each place of the GPU has to do; and where one sequence has many, or the last ones almost fill it.
    """
    if tiles * share >= _PLENTY * fill:
        return True
    return is_alone and (tiles >= waves * fill or 8 * tiles >= 7 * fill * -(-tiles // fill))


def _cut(width: int, values: int | None) -> tuple[int, int, int]:
    """Where a row of keys is cut in two, and the powers of 2 that hold its parts; the second may be none.

    A row whose beginning is the value is cut there.
    """
    if values is not None:
        return values, _power(values), _power(width - values) if values < width else 0
    half = _power(width) // 2
    if half < 16 or half + _power(width - half) >= _power(width):
        return width, _power(width), 0
    return half, half, _power(width - half)


def _counted(sequences: int) -> int:
    """Sequences that a program counts, all at once: few sizes, the smallest within a warp."""
    return next(size for size in (32, 128, 512, _power(sequences)) if size >= sequences)


def _power(size: int) -> int:
    """The power of 2 that holds it, and that a product of matrices takes as a side."""
    return max(16, 1 << (size - 1).bit_length())


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
