"""Latent attention in Triton: attention over pages whose rows are keys, and values as far as these go."""

from torch import Tensor

from bestiary_kernels.attention.triton import over_pages

__all__ = ["latent_attention"]


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
