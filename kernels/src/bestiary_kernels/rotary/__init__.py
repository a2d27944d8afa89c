"""Rotary embedding and cache write. Shapes: T tokens, H heads, D head size, R rotary dimensions, B block size."""

from struct import Struct

import torch
from torch import Tensor

from bestiary_kernels import library
from bestiary_kernels.rotary import reference

_CALL = Struct("13qi")  # RotaryCall in cpu.cpp


def rotary_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    interleaved: bool = False,
) -> None:
    """Rotate q and k in place and write the rotated k, and v, into the cache.

    q is [T, Hq, D], k and v are [T, Hk, D]; they may be views of one fused buffer (any stride between tokens). cos_sin
    is float32 [max_position, 2, R/2] with R <= D, cosines first; dimensions from R on pass through, and None rotates
    nothing. Halves of the R dimensions are turned against each other, or neighbours if `interleaved`. positions and
    slots are int64 [T]; slot = block * block_size + offset, and a negative slot is not written. Slots must be distinct.
    The caches are [blocks, Hk, B, D], each block dense. Raises ValueError for shapes that do not fit, IndexError for a
    slot or a position out of range; nothing is written then.
    """
    tokens, kv_heads, width = k.shape
    blocks, _, block_size, _ = cache_shape = k_cache.shape
    if (
        v.shape != k.shape
        or q.shape[0] != tokens
        or q.shape[2] != width
        or cache_shape != (blocks, kv_heads, block_size, width)
        or v_cache.shape != cache_shape
        or positions.shape != (tokens,)
        or slots.shape != (tokens,)
        or not (cos_sin is None or (cos_sin.dim() == 3 and cos_sin.shape[1] == 2 and 2 * cos_sin.shape[2] <= width))
    ):
        raise ValueError("rotary_cache_write: the shapes of q, k, v, cos_sin, positions, slots and caches do not fit")
    kernels = library.native(q)
    if kernels is None or not _is_supported(q, k, v, cos_sin, positions, slots, k_cache, v_cache):
        function = _operator if library.is_traced(q) else reference.rotary_cache_write
        return function(q, k, v, cos_sin, positions, slots, k_cache, v_cache, interleaved)
    call = _CALL.pack(
        tokens,
        q.shape[1],
        kv_heads,
        width,
        0 if cos_sin is None else 2 * cos_sin.shape[2],
        q.stride(0),
        k.stride(0),
        v.stride(0),
        k_cache.stride(0),
        v_cache.stride(0),
        blocks,
        block_size,
        0 if cos_sin is None else cos_sin.shape[0],
        interleaved,
    )
    failed = kernels.rotary_cache_write(
        library.IS_BF16[q.dtype],
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        None if cos_sin is None else cos_sin.data_ptr(),
        positions.data_ptr(),
        slots.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        call,
    )
    if failed:
        library.fail("rotary_cache_write", failed)


def _is_supported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> bool:
    """Whether the C++ function knows the dtypes and layouts."""
    dtype, width = q.dtype, q.shape[2]
    inner = k_cache.shape[2] * width
    return (
        dtype in library.IS_BF16
        and k.dtype is dtype
        and v.dtype is dtype
        and k_cache.dtype is dtype
        and v_cache.dtype is dtype
        and positions.dtype is torch.int64
        and slots.dtype is torch.int64
        and positions.is_contiguous()
        and slots.is_contiguous()
        and (cos_sin is None or (cos_sin.dtype is torch.float32 and cos_sin.is_contiguous()))
        and q.stride()[1:] == (width, 1)
        and k.stride()[1:] == (width, 1)
        and v.stride()[1:] == (width, 1)
        and k_cache.stride()[1:] == (inner, width, 1)
        and v_cache.stride()[1:] == (inner, width, 1)
    )


@torch.library.custom_op("bestiary::rotary_cache_write", mutates_args=("q", "k", "k_cache", "v_cache"))
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    interleaved: bool = False,
) -> None:
    reference.rotary_cache_write(q, k, v, cos_sin, positions, slots, k_cache, v_cache, interleaved)


@_operator.register_fake
def _shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    interleaved: bool = False,
) -> None:
    return None
