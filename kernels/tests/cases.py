"""What the kernel tests share: how near two results must be, and the inputs of a paged batch."""

from dataclasses import dataclass

import torch
from torch import Tensor


def assert_rounds_to(actual: Tensor, expected: Tensor, steps: float = 1.0, floor: float = 1e-5) -> None:
    """Equal up to float32 noise, or `steps` bfloat16 rounding steps of each value.

    `floor` is the noise around values that cancel to nearly nothing.
    """
    assert actual.dtype is expected.dtype and actual.shape == expected.shape
    relative = 1e-5 if actual.dtype is torch.float32 else steps * 2.0**-7
    torch.testing.assert_close(actual.float(), expected.float(), rtol=relative, atol=floor)


def assert_weighs(actual: Tensor, expected: Tensor, sizes: Tensor, floor: float = 1e-5) -> None:
    """Attention as `assert_rounds_to`; of bfloat16 each weight may be rounded too, by 2^-8 of itself.

    `sizes` is the attention over the values' sizes: as much as such errors can add up to.
    """
    assert actual.dtype is expected.dtype and actual.shape == expected.shape
    if actual.dtype is torch.float32:
        assert_rounds_to(actual, expected, floor=floor)
        return
    allowed = floor + 2.0**-7 * expected.float().abs() + 2.0**-8 * sizes.float()
    off = (actual.float() - expected.float()).abs()
    assert bool((off <= allowed).all()), f"{(off / allowed).max():.3g} times what is allowed"


@dataclass
class Batch:
    """The arguments of paged_attention for sequences of (query_len, context_len)."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    query_starts: Tensor
    context_lens: Tensor
    scale: float

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float]:
        return (
            self.q,
            self.k_cache,
            self.v_cache,
            self.block_tables,
            self.query_starts,
            self.context_lens,
            self.scale,
        )


def paged_batch(
    lengths: list[tuple[int, int]],
    *,
    kv_heads: int = 2,
    group: int = 3,
    width: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Random q, in a fused buffer, and caches whose unused blocks and slots are NaN: reading one would show."""
    queries = [query for query, _ in lengths]
    contexts = [context for _, context in lengths]
    pages = [-(-context // block_size) for context in contexts]
    blocks = sum(pages) + 3
    order = torch.randperm(blocks)[: sum(pages)].to(torch.int32)
    tables = torch.full((len(lengths), max(pages, default=0) + 2), -1, dtype=torch.int32)
    shape = (blocks, kv_heads, block_size, width)
    k_cache, v_cache = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    for row, context in enumerate(contexts):
        first = sum(pages[:row])
        tables[row, : pages[row]] = order[first : first + pages[row]]
        token = torch.arange(context)
        block, offset = tables[row, token // block_size].long(), token % block_size
        for cache in (k_cache, v_cache):
            cache[block, :, offset] = torch.randn(context, kv_heads, width).to(dtype)
    heads = kv_heads * group
    fused = torch.randn(sum(queries), (heads + 2 * kv_heads) * width).to(dtype)
    q = fused[:, : heads * width].view(-1, heads, width)
    starts = torch.tensor([0, *torch.tensor(queries, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)
    lens = torch.tensor(contexts, dtype=torch.int32)
    return Batch(q, k_cache, v_cache, tables, starts, lens, width**-0.5)
