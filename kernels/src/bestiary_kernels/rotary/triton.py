"""Rotary embedding in Triton, alone or with the cache write: a program turns a few heads of one token.

The pairs of its heads lie in two tiles [heads, R / 2], and what is not turned in a third.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bestiary_kernels.overlap.triton import overlapping, release_next, wait_for_last

__all__ = ["rotary", "rotary_cache_write"]

#: How many numbers a program's heads have, about.
_AT_ONCE = 1024


@triton.jit
def _turned(heads, step, is_head, angles, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Turn the heads that begin at the pointers `heads`, their numbers `step` apart, by the row `angles` of the table.

    Return the places of both halves of the pairs in a head, which of them there are, and the turned halves.
    """
    i = tl.arange(0, HALF_BLOCK)[None, :]
    mask = is_head & (i < HALF)
    first = 2 * i if INTERLEAVED else i
    second = 2 * i + 1 if INTERLEAVED else i + HALF
    cos = tl.load(angles + i, mask=i < HALF, other=0.0)
    sin = tl.load(angles + HALF + i, mask=i < HALF, other=0.0)
    a = tl.load(heads + first * step, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(heads + second * step, mask=mask, other=0.0).to(tl.float32)
    return first, second, mask, a * cos - b * sin, b * cos + a * sin


@triton.jit(do_not_specialize=["max_position"])
def _rotary(
    x,
    cos_sin,
    positions,
    y,
    heads,
    max_position,
    token_stride,
    head_stride,
    step,
    position_stride,
    y_stride,
    y_head_stride,
    y_step,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    position = tl.load(positions + token * position_stride).to(tl.int64)
    is_position = (position >= 0) & (position < max_position)
    is_head, is_turned = head < heads, head < tl.where(is_position, heads, 0)
    x += token * token_stride + head * head_stride
    y += token * y_stride + head * y_head_stride
    kind = x.dtype.element_ty
    if HALF > 0:
        angles = cos_sin + tl.where(is_position, position, 0) * (2 * HALF)
        first, second, _, a, b = _turned(x, step, is_turned, angles, HALF, HALF_BLOCK, INTERLEAVED)
        mask = is_head & (tl.arange(0, HALF_BLOCK)[None, :] < HALF)
        tl.store(y + first * y_step, a.to(kind), mask=mask)
        tl.store(y + second * y_step, b.to(kind), mask=mask)
    if 2 * HALF < WIDTH:
        at = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
        rest = tl.load(x + at * step, mask=is_turned & (at < WIDTH), other=0.0)
        tl.store(y + at * y_step, rest, mask=is_head & (at < WIDTH))


@triton.jit
def _turn(x, step, is_head, angles, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Turn heads in place. Return where their numbers lie, and what they are now."""
    first, second, mask, a, b = _turned(x, step, is_head, angles, HALF, HALF_BLOCK, INTERLEAVED)
    a, b = a.to(x.dtype.element_ty), b.to(x.dtype.element_ty)
    tl.debug_barrier()  # threads that hold the same number have all read it before one of them writes
    tl.store(x + first * step, a, mask=mask)
    tl.store(x + second * step, b, mask=mask)
    return first, second, mask, a, b


@triton.jit
def _write(heads, step, cache, is_written, BEGIN: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Copy heads to the cache, from number BEGIN on."""
    if BEGIN < WIDTH:
        at = BEGIN + tl.arange(0, BLOCK)[None, :]
        mask = is_written & (at < WIDTH)
        tl.store(cache + at, tl.load(heads + at * step, mask=mask, other=0.0), mask=mask)


@triton.jit(do_not_specialize=["max_position"])
def _rotary_cache_write(
    q,
    k,
    v,
    cos_sin,
    positions,
    slots,
    k_cache,
    v_cache,
    q_heads,
    kv_heads,
    q_tiles,
    max_position,
    blocks,
    block_size,
    q_stride,
    q_head_stride,
    q_step,
    k_stride,
    k_head_stride,
    k_step,
    v_stride,
    v_head_stride,
    v_step,
    k_block_stride,
    v_block_stride,
    position_stride,
    slot_stride,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """The first tiles turn heads of q; each of the rest turns heads of k, and writes them and their v."""
    release_next(OVERLAPS)
    wait_for_last(OVERLAPS)
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    angles = cos_sin
    if HALF > 0:
        position = tl.load(positions + token * position_stride).to(tl.int64)
        is_position = (position >= 0) & (position < max_position)
        angles = cos_sin + tl.where(is_position, position, 0) * (2 * HALF)
        # A token outside the table has no heads.
        q_heads, kv_heads = tl.where(is_position, q_heads, 0), tl.where(is_position, kv_heads, 0)
    if tile < q_tiles:
        if HALF > 0:
            q_head = (tile * HEADS + tl.arange(0, HEADS))[:, None]
            q_at = q + token * q_stride + q_head * q_head_stride
            _turn(q_at, q_step, q_head < q_heads, angles, HALF, HALF_BLOCK, INTERLEAVED)
    else:
        head = ((tile - q_tiles) * HEADS + tl.arange(0, HEADS))[:, None]
        slot = tl.load(slots + token * slot_stride).to(tl.int64)
        block = slot // block_size
        is_written = head < tl.where((slot >= 0) & (block < blocks), kv_heads, 0)
        in_block = (head * block_size + slot % block_size) * WIDTH
        k_at, k_to = k + token * k_stride + head * k_head_stride, k_cache + block * k_block_stride + in_block
        if HALF > 0:
            first, second, mask, a, b = _turn(k_at, k_step, head < kv_heads, angles, HALF, HALF_BLOCK, INTERLEAVED)
            tl.store(k_to + first, a, mask=mask & is_written)
            tl.store(k_to + second, b, mask=mask & is_written)
        _write(k_at, k_step, k_to, is_written, 2 * HALF, WIDTH, REST_BLOCK)
        v_at, v_to = v + token * v_stride + head * v_head_stride, v_cache + block * v_block_stride + in_block
        _write(v_at, v_step, v_to, is_written, 0, WIDTH, WIDTH_BLOCK)


def _blocks(width: int, half: int, heads: int) -> dict[str, int]:
    """The sizes that a kernel is compiled for."""
    block = triton.next_power_of_2(width)
    return {
        "WIDTH": width,
        "HALF": half,
        "HALF_BLOCK": triton.next_power_of_2(max(half, 1)),
        "REST_BLOCK": triton.next_power_of_2(max(width - 2 * half, 1)),
        "HEADS": max(1, min(triton.next_power_of_2(heads), _AT_ONCE // block)),
    }


def rotary(x: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool, out: Tensor | None = None) -> Tensor:
    """As the reference, with zeros for a token whose position is outside the table."""
    tokens, heads, width = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if y.numel():
        sizes = _blocks(width, cos_sin.shape[2], heads)
        _rotary[(tokens, triton.cdiv(heads, sizes["HEADS"]))](
            x,
            cos_sin.contiguous(),
            positions,
            y,
            heads,
            cos_sin.shape[0],
            *x.stride(),
            positions.stride(0),
            *y.stride(),
            INTERLEAVED=interleaved,
            **sizes,
        )
    return y


def rotary_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    interleaved: bool,
) -> None:
    """As the reference; a slot outside the cache, and a token whose position is outside the table, is not written."""
    tokens, kv_heads, width = k.shape
    blocks, _, block_size, _ = k_cache.shape
    q_heads = q.shape[1] if cos_sin is not None else 0  # unturned, q stays as it is
    if not tokens:
        return
    sizes = _blocks(width, 0 if cos_sin is None else cos_sin.shape[2], max(q_heads, kv_heads))
    q_tiles = triton.cdiv(q_heads, sizes["HEADS"])
    _rotary_cache_write[(tokens, q_tiles + triton.cdiv(kv_heads, sizes["HEADS"]))](
        q,
        k,
        v,
        None if cos_sin is None else cos_sin.contiguous(),
        positions,
        slots,
        k_cache,
        v_cache,
        q_heads,
        kv_heads,
        q_tiles,
        0 if cos_sin is None else cos_sin.shape[0],
        blocks,
        block_size,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        k_cache.stride(0),
        v_cache.stride(0),
        positions.stride(0),
        slots.stride(0),
        WIDTH_BLOCK=triton.next_power_of_2(width),
        INTERLEAVED=interleaved,
        **sizes,
        **overlapping(k),
    )
