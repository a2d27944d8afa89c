"""Attention over the paged cache, from grouped-query to multi-head."""

import torch
from torch import Tensor

import bestiary_kernels as kernels
from bestiary.batch import Batch
from bestiary.blocks.alibi import Alibi
from bestiary.blocks.kept import PagedKV
from bestiary.blocks.linear import Linear
from bestiary.blocks.mixer import Mixer
from bestiary.blocks.rotary import Rope
from bestiary.parallel import Mesh, scaled

__all__ = ["Attention"]


class Attention(Mixer):
    """Causal attention; query heads share heads of keys and values in groups (Ainslie 2023, arXiv 2305.13245).

    `window`: a token sees so many, itself included (Child et al. 2019, arXiv 1904.10509). `softcap` c keeps scores
    within c: c tanh(score / c). `scale` is 1 / sqrt(head_dim) where none is given.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rope: Rope | None,
        bias: bool = False,
        out_bias: bool = False,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        alibi: Alibi | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.rope = heads, kv_heads, head_dim, rope
        self.scale = head_dim**-0.5 if scale is None else scale
        self.window, self.softcap, self.alibi = window, softcap, alibi
        self.keeps = PagedKV(kv_heads, head_dim, head_dim, window)
        parts = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
        self.qkv = Linear(width, parts, "column", unit=head_dim, bias=bias)
        self.out = Linear(heads * head_dim, width, "row", bias=out_bias)

    def cut(self, mesh: Mesh) -> None:
        """Some of the query heads, and the heads of keys and values that they share."""
        own, shared = mesh.heads(self.heads, self.kv_heads)
        size = self.head_dim
        self.qkv.keep_rows(q=scaled(own, size), k=scaled(shared, size), v=scaled(shared, size))
        self.out.keep_addends(scaled(own, size), mesh)
        self.heads, self.kv_heads, self.own_heads = len(own), len(shared), own
        self.keeps = PagedKV(len(shared), size, size, self.window)

    def forward(self, x_TD: Tensor, batch: Batch) -> Tensor:
        """[T, width] to [T, width]; this step's keys and values stay in the cache."""
        qkv = self.qkv(x_TD).view(x_TD.shape[0], -1, self.head_dim)
        q, k, v = qkv.split_with_sizes((self.heads, self.kv_heads, self.kv_heads), 1)
        k_cache, v_cache = batch.caches[self.slot]
        pages = batch.pages[self.group]
        interleaved = self.rope is not None and self.rope.interleaved
        angles, positions = self._turning(batch)
        kernels.rotary_cache_write(q, k, v, angles, positions, pages.slots, k_cache, v_cache, interleaved)
        mixed = kernels.paged_attention(
            q,
            k_cache,
            v_cache,
            pages.blocks,
            batch.query_starts,
            batch.context_lens,
            self.scale,
            window=self.window,
            softcap=self.softcap,
            slopes=self.slopes,
            visible=batch.prefixes,
        )
        return self.out(mixed.view(x_TD.shape[0], -1))

    def _turning(self, batch: Batch) -> tuple[Tensor | None, Tensor]:
        """A table of angles, and each token's row of it: of all positions, or of this step's tokens on their axes."""
        rope, table = self.rope, self.angles
        if batch.axes is None or rope is None or table is None or not rope.sections:
            return table, batch.positions
        if rope not in batch.angles:
            rows = torch.arange(len(batch.positions), device=batch.positions.device)
            batch.angles[rope] = rope.turned(table, batch.axes), rows
        return batch.angles[rope]
