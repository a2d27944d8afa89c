"""What a token mixer keeps between steps, as data. The cache makes room for it; the mixer finds it in the batch."""

from dataclasses import dataclass

__all__ = ["PagedKV"]


@dataclass(frozen=True)
class PagedKV:
    """Keys and values of every token, in blocks: [blocks, heads, block size, head size] each."""

    heads: int
    k_dim: int
    v_dim: int

    def bytes_per_token(self, itemsize: int) -> int:
        """What one token takes in one layer, with `itemsize` bytes a number."""
        return self.heads * (self.k_dim + self.v_dim) * itemsize
