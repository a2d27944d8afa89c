"""Rotary embedding, alone or with a cache write.

Shapes: T tokens, H heads, D head size, R rotary dimensions, B block size.
"""

from struct import Struct

import torch
from torch import Tensor

from bestiary_kernels import gpu, library
from bestiary_kernels.rotary import reference

__all__ = ["rotary", "rotary_cache_write"]

_CALL = Struct("13qi")  # RotaryCall in cpu.cpp


def rotary(
    x_THD: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool = False, out: Tensor | None = None
) -> Tensor:
    """Return x [T, H, D] with the first R numbers of each head rotated, in `out` or dense memory of its own.

    x and out may be slices of any strides; cos_sin, positions int64 [T] and `interleaved` are as in
    `rotary_cache_write`. Raises ValueError for shapes that do not fit, IndexError for a position outside cos_sin; on a
    GPU, where nothing waits for the positions, such a token turns to zeros.
    """
    tokens, heads, width = x_THD.shape
    if cos_sin.dim() != 3 or cos_sin.shape[1] != 2 or 2 * cos_sin.shape[2] > width or positions.shape != (tokens,):
        raise ValueError("rotary: the shapes of x, cos_sin and positions do not fit")
    if out is not None and (out.shape != x_THD.shape or out.dtype is not x_THD.dtype):
        raise ValueError(f"rotary: out must be {tuple(x_THD.shape)} in x's dtype")
    if (on_gpu := gpu.kernels("rotary", x_THD)) is not None:
        found: Tensor = on_gpu.rotary(x_THD, cos_sin, positions, interleaved, out)
        return found
    kernels, is_bf16 = library.native(x_THD), library.IS_BF16.get(x_THD.dtype)
    strides = x_THD.stride()
    are_known = strides[2] == 1 and (out is None or out.stride(2) == 1) and _are_tables(cos_sin, positions)
    if kernels is None or is_bf16 is None or not are_known:
        turned = (_plain_operator if library.is_traced(x_THD) else reference.rotary)(
            x_THD, cos_sin, positions, interleaved
        )
        return turned if out is None else out.copy_(turned)
    y = x_THD.new_empty(x_THD.shape) if out is None else out
    y_strides = y.stride()
    failed = kernels.rotary(
        is_bf16,
        x_THD.data_ptr(),
        cos_sin.data_ptr(),
        positions.data_ptr(),
        y.data_ptr(),
        tokens,
        heads,
        width,
        2 * cos_sin.shape[2],
        strides[0],
        strides[1],
        y_strides[0],
        y_strides[1],
        cos_sin.shape[0],
        interleaved,
    )
    if failed:
        library.fail("rotary", failed)
    return y


def _are_tables(cos_sin: Tensor, positions: Tensor) -> bool:
    """Whether C++ knows their dtypes and layouts."""
    is_known = cos_sin.dtype is torch.float32 and positions.dtype is torch.int64
    return is_known and cos_sin.is_contiguous() and positions.is_contiguous()


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
    slot or a position out of range; nothing is written then. On a GPU, where nothing waits for the numbers, a slot
    outside the cache is not written, and a token with a position out of range stays as it is and is not written.
    """
    tokens, kv_heads, width = kv_shape = k.shape
    q_tokens, _, q_width = q.shape
    _, cache_heads, _, cache_width = cache_shape = k_cache.shape
    if (
        v.shape != kv_shape
        or (q_tokens, q_width) != (tokens, width)
        or (cache_heads, cache_width) != (kv_heads, width)
        or v_cache.shape != cache_shape
        or positions.shape != (tokens,)
        or slots.shape != (tokens,)
        or not (cos_sin is None or (cos_sin.dim() == 3 and cos_sin.shape[1] == 2 and 2 * cos_sin.shape[2] <= width))
    ):
        raise ValueError("rotary_cache_write: the shapes of q, k, v, cos_sin, positions, slots and caches do not fit")
    if (on_gpu := gpu.kernels("rotary", q)) is not None:
        on_gpu.rotary_cache_write(q, k, v, cos_sin, positions, slots, k_cache, v_cache, interleaved)
        return
    kernels = library.native(q)
    call = None if kernels is None else _describe(q, k, v, cos_sin, positions, slots, k_cache, v_cache, interleaved)
    if kernels is None or call is None:
        function = _operator if library.is_traced(q) else reference.rotary_cache_write
        function(q, k, v, cos_sin, positions, slots, k_cache, v_cache, interleaved)
        return
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


def _describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    interleaved: bool,
) -> bytes | None:
    """The sizes that the C++ function reads; None where it does not know the dtypes or layouts."""
    dtype = q.dtype
    tokens, q_heads, width = q.shape
    blocks, kv_heads, block_size, _ = k_cache.shape
    q_stride, k_stride, v_stride = q.stride(), k.stride(), v.stride()
    k_cache_stride, v_cache_stride = k_cache.stride(), v_cache.stride()
    in_head, in_block = (width, 1), (block_size * width, width, 1)
    if (
        dtype not in library.IS_BF16
        or not dtype is k.dtype is v.dtype is k_cache.dtype is v_cache.dtype
        or not torch.int64 is positions.dtype is slots.dtype
        or not (positions.is_contiguous() and slots.is_contiguous())
        or not q_stride[1:] == k_stride[1:] == v_stride[1:] == in_head
        or not k_cache_stride[1:] == v_cache_stride[1:] == in_block
    ):
        return None
    max_position = rotary_width = 0
    if cos_sin is not None:
        if cos_sin.dtype is not torch.float32 or not cos_sin.is_contiguous():
            return None
        max_position, _, half = cos_sin.shape
        rotary_width = 2 * half
    return _CALL.pack(
        tokens,
        q_heads,
        kv_heads,
        width,
        rotary_width,
        q_stride[0],
        k_stride[0],
        v_stride[0],
        k_cache_stride[0],
        v_cache_stride[0],
        blocks,
        block_size,
        max_position,
        interleaved,
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


@torch.library.custom_op("bestiary::rotary", mutates_args=())
def _plain_operator(x: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool = False) -> Tensor:
    return reference.rotary(x, cos_sin, positions, interleaved)


@_plain_operator.register_fake
def _plain_shape(x: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool = False) -> Tensor:
    return x.new_empty(x.shape)
