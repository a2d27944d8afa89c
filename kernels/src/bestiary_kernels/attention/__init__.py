"""Paged attention. Shapes: T query tokens, S sequences, Hq and Hk heads, D head size, B block size."""

from struct import Struct

import torch
from torch import Tensor

from bestiary_kernels import library
from bestiary_kernels.attention import reference

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
    tokens, q_heads, width = q.shape
    blocks, kv_heads, block_size, _ = cache_shape = k_cache.shape
    sequences = context_lens.shape[0]
    if (
        v_cache.shape != cache_shape
        or cache_shape[3] != width
        or q_heads % kv_heads
        or query_starts.shape[0] != sequences + 1
        or block_tables.dim() != 2
        or block_tables.shape[0] != sequences
        or not (out is None or (out.shape == q.shape and out.dtype is q.dtype))
    ):
        raise ValueError("paged_attention: the shapes of q, caches, tables, starts, lengths and out do not fit")
    kernels = library.native(q)
    if kernels is None or not _is_supported(q, k_cache, v_cache, block_tables, query_starts, context_lens, out):
        function = _operator if library.is_traced(q) else reference.paged_attention
        y = function(q, k_cache, v_cache, block_tables, query_starts, context_lens, scale)
        return y if out is None else out.copy_(y)
    if out is None:
        out = q.new_empty(q.shape)
    call = _CALL.pack(
        tokens,
        sequences,
        q_heads,
        kv_heads,
        width,
        q.stride(0),
        k_cache.stride(0),
        v_cache.stride(0),
        blocks,
        block_size,
        block_tables.shape[1],
    )
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


def _is_supported(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    out: Tensor | None,
) -> bool:
    """Whether the C++ function knows the dtypes and layouts."""
    dtype, width = q.dtype, q.shape[2]
    inner = k_cache.shape[2] * width
    return (
        dtype in library.IS_BF16
        and k_cache.dtype is dtype
        and v_cache.dtype is dtype
        and block_tables.dtype is torch.int32
        and query_starts.dtype is torch.int32
        and context_lens.dtype is torch.int32
        and block_tables.is_contiguous()
        and query_starts.is_contiguous()
        and context_lens.is_contiguous()
        and q.stride()[1:] == (width, 1)
        and k_cache.stride()[1:] == (inner, width, 1)
        and v_cache.stride()[1:] == (inner, width, 1)
        and (out is None or out.is_contiguous())
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
