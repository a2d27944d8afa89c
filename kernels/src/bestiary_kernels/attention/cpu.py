"""The call of the C++ attention, which also serves latent rows. Knows which dtypes and layouts that function takes."""

from struct import Struct

import torch
from torch import Tensor

from bestiary_kernels import library

__all__ = ["attention"]

_CALL = Struct("21qd")  # AttentionCall in plan.hpp


def attention(
    kernels: library.Kernels,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    value_width: int,
    tables: tuple[Tensor, Tensor, Tensor],
    out: Tensor | None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    visible: Tensor | None = None,
    causal: bool = True,
    ranges: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor | None:
    """Return attention [T, Hq, value_width], or None where the C++ function does not know the dtypes or layouts.

    The values are the first `value_width` numbers of the rows of v_cache; `tables` are the block tables, query starts
    and context lengths. That shapes and settings fit has been seen already.
    """
    block_tables, query_starts, context_lens = tables
    dtype = q.dtype
    tokens, q_heads, width = q.shape
    blocks, kv_heads, block_size, v_width = v_cache.shape
    sequences, max_blocks = block_tables.shape
    q_stride, k_stride, v_stride = q.stride(), k_cache.stride(), v_cache.stride()
    if (
        dtype not in library.IS_BF16
        or not dtype is k_cache.dtype is v_cache.dtype
        or not torch.int32 is block_tables.dtype is query_starts.dtype is context_lens.dtype
        or not (block_tables.is_contiguous() and query_starts.is_contiguous() and context_lens.is_contiguous())
        or q_stride[1:] != (width, 1)
        or k_stride[1:] != (block_size * width, width, 1)
        or v_stride[1:] != (block_size * v_width, v_width, 1)
        or not (out is None or out.is_contiguous())
        or not all(x is None or (x.dtype in library.IS_BF16 and x.is_contiguous()) for x in (slopes, sinks))
        or not all(x is None or (x.dtype is torch.int32 and x.is_contiguous()) for x in (visible, ranges))
    ):
        return None
    if out is None:
        out = q.new_empty((tokens, q_heads, value_width))
    failed = kernels.paged_attention(
        library.IS_BF16[dtype],
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        out.data_ptr(),
        block_tables.data_ptr(),
        query_starts.data_ptr(),
        context_lens.data_ptr(),
        scale,
        _CALL.pack(
            *(tokens, sequences, q_heads, kv_heads, width, value_width),
            *(q_stride[0], k_stride[0], v_stride[0], v_width),
            *(blocks, block_size, max_blocks, causal, window or 0),
            0 if visible is None else visible.data_ptr(),
            0 if ranges is None else ranges.data_ptr(),
            0 if slopes is None else slopes.data_ptr(),
            slopes is not None and slopes.dtype is torch.bfloat16,
            0 if sinks is None else sinks.data_ptr(),
            sinks is not None and sinks.dtype is torch.bfloat16,
            softcap or 0.0,
        ),
    )
    if failed:
        library.fail("paged_attention", failed)
    return out
