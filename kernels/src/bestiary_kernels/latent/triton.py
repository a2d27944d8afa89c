"""Latent rows in Triton: the write to their cache, and attention over pages whose rows are keys, and values in part."""

import triton
import triton.language as tl
from torch import Tensor

from bestiary_kernels.attention.triton import over_pages

__all__ = ["cache_write", "latent_attention"]


@triton.jit
def _cache_write(
    rows,
    slots,
    cache,
    blocks,
    block_size,
    width,
    row_stride,
    column_stride,
    slot_stride,
    block_stride,
    offset_stride,
    cache_column_stride,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token * slot_stride).to(tl.int64)
    block, at = slot // block_size, tl.arange(0, BLOCK)
    mask = at < tl.where((slot >= 0) & (block < blocks), width, 0)
    row = tl.load(rows + token * row_stride + at * column_stride, mask=mask, other=0)
    to = cache + block * block_stride + slot % block_size * offset_stride
    tl.store(to + at * cache_column_stride, row, mask=mask)


def cache_write(rows: Tensor, slots: Tensor, cache: Tensor) -> None:
    """As the reference; a slot outside the cache is not written."""
    blocks, block_size, width = cache.shape
    if rows.numel():
        _cache_write[(rows.shape[0],)](
            rows,
            slots,
            cache,
            blocks,
            block_size,
            width,
            *rows.stride(),
            slots.stride(0),
            *cache.stride(),
            BLOCK=triton.next_power_of_2(width),
        )


def latent_attention(
    q: Tensor,
    cache: Tensor,
    value_dim: int,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """As the reference, into `out` if that is given."""
    out = q.new_empty(*q.shape[:2], value_dim) if out is None else out
    over_pages(q, cache[:, None], None, block_tables, query_starts, context_lens, scale, out)
    return out
