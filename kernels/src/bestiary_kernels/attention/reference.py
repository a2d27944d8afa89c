"""Paged attention in torch: the meaning of `paged_attention`. Gathers pages and computes an explicit softmax."""

import torch
from torch import Tensor

from bestiary_kernels import library

__all__ = ["paged_attention"]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """Return softmax(scale q k^T) v per sequence, causal, in float32, rounded once to q's dtype.

    Shapes as in `bestiary_kernels.paged_attention`. Raises IndexError for a block id outside the cache and ValueError
    for starts and lengths that do not fit.
    """
    tokens, q_heads, width = q.shape
    blocks, kv_heads, block_size, _ = k_cache.shape
    starts, contexts = query_starts.tolist(), context_lens.tolist()
    if starts[0] != 0 or starts[-1] != tokens or starts != sorted(starts):
        library.fail("paged_attention", library.BAD_RAGGED)
    out = torch.empty(tokens, q_heads, width, dtype=q.dtype, device=q.device)
    for start, end, context, table in zip(starts[:-1], starts[1:], contexts, block_tables, strict=True):
        pages = -(-context // block_size)
        if context < end - start or pages > len(table):
            library.fail("paged_attention", library.BAD_RAGGED)
        ids = table[:pages].long()
        if bool(((ids < 0) | (ids >= blocks)).any()):
            library.fail("paged_attention", library.BAD_BLOCK)
        if end == start:
            continue
        k = k_cache[ids].transpose(0, 1).reshape(kv_heads, -1, width)[:, :context].float()
        v = v_cache[ids].transpose(0, 1).reshape(kv_heads, -1, width)[:, :context].float()
        rows = q[start:end].float().view(end - start, kv_heads, -1, width).permute(1, 2, 0, 3)  # [Hk, group, L, D]
        scores = rows @ k[:, None].transpose(-1, -2) * scale
        position = torch.arange(context - (end - start), context, device=q.device)
        hidden = torch.arange(context, device=q.device) > position[:, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[start:end] = (weights @ v[:, None]).permute(2, 0, 1, 3).reshape(end - start, q_heads, width)
    return out
