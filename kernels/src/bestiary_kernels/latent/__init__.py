"""Multi-head latent attention over its own cache, which holds one row a token for all heads.

Shapes: T query tokens, S sequences, H heads, D width of a row, B block size.
"""

import torch
from torch import Tensor

from bestiary_kernels import gpu, library
from bestiary_kernels.attention import cpu
from bestiary_kernels.latent import reference

__all__ = ["cache_write", "latent_attention"]


def cache_write(rows_TD: Tensor, slots: Tensor, cache: Tensor) -> None:
    """Write row t of [T, D] to slot `slots[t]` of the cache [blocks, B, D]; slot = block * B + offset, int64 [T].

    The cache may be a slice of wider rows. A negative slot is not written; slots must be distinct. Raises ValueError
    for shapes or dtypes that do not fit, IndexError for a slot outside the cache; nothing is written then. On a GPU,
    where nothing waits for the slots, such a row is not written.
    """
    if cache.dim() != 3 or rows_TD.shape != (*slots.shape, cache.shape[2]) or rows_TD.dtype is not cache.dtype:
        raise ValueError("cache_write: the shapes or dtypes of rows, slots and cache do not fit")
    if (on_gpu := gpu.kernels("latent", rows_TD)) is not None:
        on_gpu.cache_write(rows_TD, slots, cache)
        return
    kernels = library.native(rows_TD)
    blocks, block_size, width = cache.shape
    are_dense = rows_TD.stride(1) == cache.stride(2) == 1 and slots.is_contiguous()
    if kernels is None or not are_dense or slots.dtype is not torch.int64:
        (_write_operator if library.is_traced(rows_TD) else reference.cache_write)(rows_TD, slots, cache)
        return
    size = cache.element_size()
    failed = kernels.cache_write(
        rows_TD.data_ptr(),
        slots.data_ptr(),
        cache.data_ptr(),
        rows_TD.shape[0],
        width * size,
        rows_TD.stride(0) * size,
        blocks,
        block_size,
        cache.stride(0) * size,
        cache.stride(1) * size,
    )
    if failed:
        library.fail("cache_write", failed)


def latent_attention(
    q_THD: Tensor,
    cache: Tensor,
    value_dim: int,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """Return causal attention [T, H, value_dim] of a ragged batch over latent rows (DeepSeek-V2, arXiv 2405.04434).

    A row of the cache [blocks, B, D] is the key of its token for all heads, and its first `value_dim` numbers are the
    value: the absorbed form, where queries carry the key projection and the caller applies the value projection after.
    q is [T, H, D]; the rest, and what is raised, is as in `paged_attention`.
    """
    tokens, heads, width = q_THD.shape
    (sequences,) = context_lens.shape
    shape = (tokens, heads, value_dim)
    if cache.dim() != 3 or cache.shape[2] != width or not 0 < value_dim <= width:
        raise ValueError(f"latent_attention: q has width {width}, the cache {tuple(cache.shape)}, values {value_dim}")
    if query_starts.shape != (sequences + 1,) or block_tables.dim() != 2 or block_tables.shape[0] != sequences:
        raise ValueError("latent_attention: the shapes of tables, starts and lengths do not fit")
    if out is not None and (out.shape != shape or out.dtype is not q_THD.dtype):
        raise ValueError(f"latent_attention: out must be {shape} in q's dtype")
    tables = (block_tables, query_starts, context_lens)
    if (on_gpu := gpu.kernels("latent", q_THD)) is not None:
        found: Tensor = on_gpu.latent_attention(q_THD, cache, value_dim, *tables, scale, out)
        return found
    if (kernels := library.native(q_THD)) is not None:
        rows = cache[:, None]
        y = cpu.attention(kernels, q_THD, rows, rows, value_dim, tables, out, scale)
        if y is not None:
            return y
    function = _operator if library.is_traced(q_THD) else reference.latent_attention
    y = function(q_THD, cache, value_dim, *tables, scale)
    return y if out is None else out.copy_(y)


@torch.library.custom_op("bestiary::cache_write", mutates_args=("cache",))
def _write_operator(rows: Tensor, slots: Tensor, cache: Tensor) -> None:
    reference.cache_write(rows, slots, cache)


@_write_operator.register_fake
def _nothing(rows: Tensor, slots: Tensor, cache: Tensor) -> None:
    return None


@torch.library.custom_op("bestiary::latent_attention", mutates_args=())
def _operator(
    q: Tensor,
    cache: Tensor,
    value_dim: int,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    return reference.latent_attention(q, cache, value_dim, block_tables, query_starts, context_lens, scale)


@_operator.register_fake
def _shape(
    q: Tensor,
    cache: Tensor,
    value_dim: int,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    return q.new_empty(*q.shape[:2], value_dim)
