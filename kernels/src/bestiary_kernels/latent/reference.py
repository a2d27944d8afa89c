"""Latent attention in torch: the meaning of `latent_attention` and of the write to its cache."""

import torch
from torch import Tensor

from bestiary_kernels import library
from bestiary_kernels.attention.reference import paged_attention

__all__ = ["cache_write", "latent_attention"]


def cache_write(rows: Tensor, slots: Tensor, cache: Tensor) -> None:
    """Write rows [T, D] to their slots. Raises IndexError before anything is written."""
    blocks, block_size, _ = cache.shape
    if bool((slots >= blocks * block_size).any()):
        library.fail("cache_write", library.BAD_SLOT)
    written = torch.nonzero(slots >= 0).squeeze(-1)
    cache[slots[written] // block_size, slots[written] % block_size] = rows[written]


def latent_attention(
    q: Tensor,
    cache: Tensor,
    value_dim: int,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """Return [T, H, value_dim]: attention whose one head of keys is the rows, and of values their beginning."""
    rows = cache[:, None]
    return paged_attention(q, rows, rows[..., :value_dim], block_tables, query_starts, context_lens, scale)
