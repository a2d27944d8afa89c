"""What attention's kernel does with the keys of an entry: tile after tile, it adds them to the state of the rows.

A row's state is its largest score, the sum of its weights, and the weighted sum of values. Nothing is loaded under a
mask that a tile would have to be loaded number by number for: of keys outside the span the nearest inside is read, and
of a table's entry outside the cache the nearest block; what may not be seen gets no weight.
"""

import triton
import triton.language as tl

__all__ = ["sweep"]

_LOG2E = tl.constexpr(1.4426950408889634)
#: The largest score of a row that has seen nothing: a number, so that no difference is of two infinities.
_NOTHING = tl.constexpr(-3.0e38)


@triton.jit
def _scored(scores, key, scale, softcap, slope):
    """Scores as exponents of 2; the host put what it could into `scale` and `softcap`."""
    scores *= scale
    if softcap is not None:
        small = tl.exp2(tl.abs(scores) * (-2 * _LOG2E))
        bent = (1 - small) / (1 + small) * softcap
        scores = tl.where(scores < 0, -bent, bent)
    if slope is not None:
        place = key.to(tl.float32).to(slope.dtype).to(tl.float32)
        bias = (slope.to(tl.float32)[:, None] * place[None, :]).to(slope.dtype)
        scores += bias.to(tl.float32) * _LOG2E
    return scores


@triton.jit
def _places(start, low, high, table, blocks, MASKED: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Blocks and offsets of a tile of keys, which is whole unless it is masked."""
    n = tl.arange(0, BLOCK_N)
    if MASKED or BLOCK_N % PAGE != 0:
        key = (tl.minimum(tl.maximum(start + n, low), high - 1) if MASKED else start + n).to(tl.uint32)
        index, offset = key // PAGE, key % PAGE
    else:
        index, offset = start // PAGE + n // PAGE, n % PAGE  # all but one number is the same for all tiles
    block = tl.load(table + index)
    return tl.maximum(tl.minimum(block, blocks - 1), 0).to(tl.uint32), offset


@triton.jit
def _tile(cache, block, offset, strides, FIRST: tl.constexpr, END: tl.constexpr, BLOCK: tl.constexpr):
    """Of the rows there the numbers from FIRST to before END."""
    # In bytes, of two factors that have 32 bits and no sign, this is one instruction.
    size: tl.constexpr = cache.dtype.element_ty.primitive_bitwidth // 8
    far = block.to(tl.uint64) * (strides[0] * size).to(tl.uint32).to(tl.uint64)
    at = (cache + offset * strides[2]).to(tl.pointer_type(tl.uint8), bitcast=True) + far
    at = at.to(cache.dtype, bitcast=True)
    d = FIRST + tl.arange(0, BLOCK)
    if END < FIRST + BLOCK:
        tile = tl.load(at[:, None] + d[None, :], mask=(d < END)[None, :], other=0.0)
    else:
        tile = tl.load(at[:, None] + d[None, :])
    return tile


@triton.jit
def _weights(
    start, scores, largest, weight, lows, highs, slope, scale, softcap,
    MASKED: tl.constexpr, BOUNDED: tl.constexpr, FOLDS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What a tile's scores weigh, what becomes of the weight of what was before, and the rows' state after it."""
    key = start + tl.arange(0, BLOCK_N)
    if not FOLDS:
        scores = _scored(scores, key, scale, softcap, slope)
        scale = 1.0
    if MASKED:
        seen = key[None, :] < highs[:, None]
        if BOUNDED:
            seen &= key[None, :] >= lows[:, None]
        scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(largest, tl.max(scores, 1) * scale)
    weights = tl.exp2(tl.fma(scores, scale, -new[:, None]))
    fade = tl.exp2(largest - new)
    return weights, fade, new, weight * fade + tl.sum(weights, 1)


@triton.jit
def _step(
    start, largest, weight, mixed, q0, q1, lows, highs, slope, keys, values, table, k_strides, v_strides, low, high,
    blocks, scale, softcap, MASKED: tl.constexpr, BOUNDED: tl.constexpr, SHARED: tl.constexpr, FOLDS: tl.constexpr,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, CUT: tl.constexpr, VALUES: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys."""
    block, offset = _places(start, low, high, table, blocks, MASKED, PAGE, BLOCK_N)
    key = _tile(keys, block, offset, k_strides, 0, CUT, BLOCK_D).to(q0.dtype)
    scores = tl.dot(q0, tl.trans(key), input_precision="ieee")
    if BLOCK_E > 0:
        rest = _tile(keys, block, offset, k_strides, CUT, WIDTH, BLOCK_E).to(q0.dtype)
        scores = tl.dot(q1, tl.trans(rest), scores, input_precision="ieee")
    weights, fade, largest, weight = _weights(
        start, scores, largest, weight, lows, highs, slope, scale, softcap, MASKED, BOUNDED, FOLDS, BLOCK_N
    )
    value = key
    if not SHARED:
        value = _tile(values, block, offset, v_strides, 0, VALUES, BLOCK_V).to(q0.dtype)
    mixed = tl.dot(weights.to(q0.dtype), value, mixed * fade[:, None], input_precision="ieee")
    return largest, weight, mixed


@triton.jit
def sweep(
    start, end, low, high, whole, q0, q1, lows, highs, slope, keys, values, table, k_strides, v_strides, blocks, scale,
    softcap, BOUNDED: tl.constexpr, SHARED: tl.constexpr, FOLDS: tl.constexpr, PAGE: tl.constexpr,
    WIDTH: tl.constexpr, CUT: tl.constexpr, VALUES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The state of the rows after the keys from `start` to before `end`.

    A row sees the keys from its `lows` on, if they are bounded there, to before its `highs`; none sees others than
    those from `low` to before `high`. If they are not bounded each sees all before `whole`.
    """
    largest = tl.full((BLOCK_M,), _NOTHING, tl.float32)
    weight = tl.full((BLOCK_M,), 0.0, tl.float32)
    mixed = tl.full((BLOCK_M, BLOCK_V), 0.0, tl.float32)
    if BLOCK_Q > 1 and not BOUNDED:
        whole = start + tl.maximum(tl.minimum(end, whole) - start, 0) // BLOCK_N * BLOCK_N
        for at in range(start, whole, BLOCK_N):
            largest, weight, mixed = _step(
                at, largest, weight, mixed, q0, q1, lows, highs, slope, keys, values, table, k_strides, v_strides, low,
                high, blocks, scale, softcap, False, BOUNDED, SHARED, FOLDS, PAGE, WIDTH, CUT, VALUES, BLOCK_N,
                BLOCK_D, BLOCK_E, BLOCK_V,
            )  # fmt: skip
        start = whole
    for at in range(start, end, BLOCK_N):
        largest, weight, mixed = _step(
            at, largest, weight, mixed, q0, q1, lows, highs, slope, keys, values, table, k_strides, v_strides, low,
            high, blocks, scale, softcap, True, BOUNDED, SHARED, FOLDS, PAGE, WIDTH, CUT, VALUES, BLOCK_N, BLOCK_D,
            BLOCK_E, BLOCK_V,
        )  # fmt: skip
    return largest, weight, mixed
