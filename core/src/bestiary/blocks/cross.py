"""Attention to what a sequence looks at beside its own tokens: an encoder's text, or pictures."""

from torch import Tensor

import bestiary_kernels as kernels
from bestiary.batch import Batch
from bestiary.blocks.kept import Crossed
from bestiary.blocks.linear import Linear
from bestiary.blocks.mixer import Mixer
from bestiary.blocks.norm import RMSNorm
from bestiary.parallel import Mesh, scaled

__all__ = ["CrossAttention"]


class CrossAttention(Mixer):
    """Queries of the sequence's tokens, keys and values of the other vectors; every token sees all of these,
    or the range of them that its prompt says.

    `most` is how many vectors a sequence may look at. With `qk_eps` each head of queries and of keys is normalised.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        most: int,
        bias: bool = False,
        qk_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.keeps = Crossed(kv_heads, head_dim, most)
        self.q = Linear(width, heads * head_dim, "column", unit=head_dim, bias=bias)
        self.kv = Linear(
            width, {"k": kv_heads * head_dim, "v": kv_heads * head_dim}, "column", unit=head_dim, bias=bias
        )
        self.kv.over = "vectors"
        self.q_norm, self.k_norm = (None if qk_eps is None else RMSNorm(head_dim, qk_eps) for _ in range(2))
        self.out = Linear(heads * head_dim, width, "row", bias=bias)

    def cut(self, mesh: Mesh) -> None:
        """Some of the query heads, and the heads of keys and values that they share."""
        own, shared = mesh.heads(self.heads, self.kv_heads)
        size = self.head_dim
        self.q.keep_rows(out=scaled(own, size))
        self.kv.keep_rows(k=scaled(shared, size), v=scaled(shared, size))
        self.out.keep_addends(scaled(own, size), mesh)
        self.heads, self.kv_heads = len(own), len(shared)
        self.keeps = Crossed(len(shared), size, self.keeps.kind.crossed or 0)

    def forward(self, x_TD: Tensor, batch: Batch) -> Tensor:
        """[T, width] to [T, width]; keys and values of vectors that are new stay in the cache."""
        k_cache, v_cache = batch.caches[self.slot]
        crossing = batch.crossings[self.group]
        if crossing.vectors is not None and crossing.slots is not None:
            k, v = self.kv(crossing.vectors).view(-1, 2, self.kv_heads, self.head_dim).unbind(1)
            k = self._normed(k, self.k_norm)
            # Nothing turns: neither queries nor positions matter here.
            kernels.rotary_cache_write(k, k, v, None, crossing.slots, crossing.slots, k_cache, v_cache)
        mixed = kernels.paged_attention(
            self._normed(self.q(x_TD).view(x_TD.shape[0], self.heads, self.head_dim), self.q_norm),
            k_cache,
            v_cache,
            crossing.blocks,
            batch.query_starts,
            crossing.lens,
            self.head_dim**-0.5,
            causal=False,
            ranges=crossing.ranges,
        )
        return self.out(mixed.view(x_TD.shape[0], -1))

    def _normed(self, x_THD: Tensor, norm: RMSNorm | None) -> Tensor:
        if norm is None:
            return x_THD
        y_THD: Tensor = norm(x_THD.reshape(-1, self.head_dim))[0].view(x_THD.shape)
        return y_THD
