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
    window: int | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    visible: Tensor | None = None,
    causal: bool = True,
    ranges: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return softmax(scale q k^T) v per sequence in float32, rounded once to q's dtype.

    Shapes and settings as in `bestiary_kernels.paged_attention`, but values may have a width of their own. Raises
    IndexError for a block id outside the cache and ValueError for starts and lengths that do not fit.
    """
    starts, contexts = query_starts.tolist(), context_lens.tolist()
    prefixes = [0] * len(contexts) if visible is None else visible.tolist()
    if starts[0] != 0 or starts[-1] != len(q) or starts != sorted(starts):
        library.fail("paged_attention", library.BAD_RAGGED)
    out = q.new_empty(*q.shape[:-1], v_cache.shape[-1])
    for start, end, context, prefix, table in zip(
        starts[:-1], starts[1:], contexts, prefixes, block_tables, strict=True
    ):
        position = context - (end - start)  # of the first query
        if causal and position < 0:
            library.fail("paged_attention", library.BAD_RAGGED)
        first = 0 if window is None or position < prefix else max(0, position - window + 1)
        ids = _blocks(table, first, context, k_cache)
        if end == start:
            continue
        k, v = (_rows(cache, ids, first, context) for cache in (k_cache, v_cache))
        scores = _scores(q[start:end], k, first, scale, softcap, slopes)
        if causal:
            scores = scores.masked_fill(_hidden(position, first, context, window, prefix, q.device), float("-inf"))
        if ranges is not None:
            scores = scores.masked_fill(_outside(ranges[start:end], context), float("-inf"))
        # A query that sees no key has no weights.
        out[start:end] = (_weights(scores, sinks).nan_to_num() @ v[:, None]).permute(2, 0, 1, 3).flatten(1, 2)
    return out


def _blocks(table: Tensor, first: int, context: int, cache: Tensor) -> Tensor:
    """Ids of the blocks with the keys from `first` on."""
    blocks, _, block_size, _ = cache.shape
    pages = -(-context // block_size)
    if pages > len(table):
        library.fail("paged_attention", library.BAD_RAGGED)
    ids = table[first // block_size : pages].long()
    if bool(((ids < 0) | (ids >= blocks)).any()):
        library.fail("paged_attention", library.BAD_BLOCK)
    return ids


def _rows(cache: Tensor, ids: Tensor, first: int, context: int) -> Tensor:
    """The cache's rows of the tokens `first` to `context`, which lie in the blocks `ids`: float32 [Hk, tokens, D]."""
    _, heads, block_size, width = cache.shape
    skipped = first % block_size
    rows = cache[ids].transpose(0, 1).reshape(heads, -1, width)
    return rows[:, skipped : skipped + context - first].float()


def _scores(q: Tensor, k: Tensor, first: int, scale: float, softcap: float | None, slopes: Tensor | None) -> Tensor:
    """What each query thinks of each key, [Hk, group, queries, keys]; the first key stands at `first`."""
    kv_heads, keys, width = k.shape
    rows = q.float().view(len(q), kv_heads, -1, width).permute(1, 2, 0, 3)
    scores = rows @ k[:, None].transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        bias = slopes[:, None] * torch.arange(first, first + keys, device=q.device)
        scores = scores + bias.float().view(kv_heads, len(slopes) // kv_heads, 1, keys)
    return scores


def _weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """The scores' softmax, of which sinks take a part."""
    if sinks is None:
        return scores.softmax(-1)
    kv_heads, group, queries, _ = scores.shape
    column = sinks.float().view(kv_heads, group, 1, 1).expand(-1, -1, queries, 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1]


def _hidden(position: int, first: int, context: int, window: int | None, prefix: int, device: torch.device) -> Tensor:
    """Which of the keys `first` to `context` are hidden from the queries from `position` on, [queries, keys]."""
    query = torch.arange(position, context, device=device)[:, None]
    key = torch.arange(first, context, device=device)
    hidden = key > query
    if window is not None:
        hidden |= query - key >= window
    return hidden & ~((query < prefix) & (key < prefix))


def _outside(ranges: Tensor, context: int) -> Tensor:
    """Which keys are not in a query's range, [queries, keys]."""
    key = torch.arange(context, device=ranges.device)
    return (key < ranges[:, :1]) | (key >= ranges[:, 1:])
