"""Paged attention. Shapes: T query tokens, S sequences, Hq and Hk heads, D head size, B block size."""

from struct import Struct

import torch
from torch import Tensor

from bestiary_kernels import library
from bestiary_kernels.attention import reference

__all__ = ["paged_attention"]

_CALL = Struct("11q")  # AttentionCall in cpu.cpp


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """Return causal attention [T, Hq, D] of a ragged batch over the paged cache; prefill and decode in one call.

    q is [T, Hq, D], tokens may be strided; the caches are [blocks, Hk, B, D], each block dense, and Hk divides Hq.
    block_tables is int32 [S, max_blocks], query_starts int32 [S + 1] (cumulative, from 0 to T), context_lens int32 [S]:
    all tokens of the sequence, this step's included. Query i of a sequence stands at context_len - query_len + i and
    sees the keys 0 to there. Computed in float32, rounded once. `out` receives the result if given (dense). Raises
    ValueError for shapes, starts or lengths that do not fit, IndexError for a block id outside the cache.
    """
    _, q_heads, width = q.shape
    _, kv_heads, _, cache_width = cache_shape = k_cache.shape
    (sequences,) = context_lens.shape
    if (
        v_cache.shape != cache_shape
        or cache_width != width
        or q_heads % kv_heads
        or query_starts.shape != (sequences + 1,)
        or block_tables.dim() != 2
        or block_tables.shape[0] != sequences
        or not (out is None or (out.shape == q.shape and out.dtype is q.dtype))
    ):
        raise ValueError("paged_attention: the shapes of q, caches, tables, starts, lengths and out do not fit")
    kernels = library.native(q)
    call = None if kernels is None else _describe(q, k_cache, v_cache, block_tables, query_starts, context_lens)
    if kernels is None or call is None or not (out is None or out.is_contiguous()):
        function = _operator if library.is_traced(q) else reference.paged_attention
        y = function(q, k_cache, v_cache, block_tables, query_starts, context_lens, scale)
        return y if out is None else out.copy_(y)
    if out is None:
        out = q.new_empty(q.shape)
    failed = kernels.paged_attention(
        library.IS_BF16[q.dtype],
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        out.data_ptr(),
        block_tables.data_ptr(),
        query_starts.data_ptr(),
        context_lens.data_ptr(),
        scale,
        call,
    )
    if failed:
        library.fail("paged_attention", failed)
    return out


def _describe(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, query_starts: Tensor, context_lens: Tensor
) -> bytes | None:
    """The sizes that the C++ function reads; None where it does not know the dtypes or layouts."""
    dtype = q.dtype
    tokens, q_heads, width = q.shape
    blocks, kv_heads, block_size, _ = k_cache.shape
    sequences, max_blocks = block_tables.shape
    q_stride, k_stride, v_stride = q.stride(), k_cache.stride(), v_cache.stride()
    if (
        dtype not in library.IS_BF16
        or not dtype is k_cache.dtype is v_cache.dtype
        or not torch.int32 is block_tables.dtype is query_starts.dtype is context_lens.dtype
        or not (block_tables.is_contiguous() and query_starts.is_contiguous() and context_lens.is_contiguous())
        or q_stride[1:] != (width, 1)
        or not k_stride[1:] == v_stride[1:] == (block_size * width, width, 1)
    ):
        return None
    return _CALL.pack(
        tokens,
        sequences,
        q_heads,
        kv_heads,
        width,
        q_stride[0],
        k_stride[0],
        v_stride[0],
        blocks,
        block_size,
        max_blocks,
    )


@torch.library.custom_op("bestiary::paged_attention", mutates_args=())
def _operator(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    return reference.paged_attention(q, k_cache, v_cache, block_tables, query_starts, context_lens, scale)


@_operator.register_fake
def _shapes(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    return q.new_empty(q.shape)
