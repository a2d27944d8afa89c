"""Paged attention with all its settings, and latent attention: drawn batches against one query at a time in float64."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from bestiary_kernels import latent_attention as attend_rows
from bestiary_kernels import paged_attention as attend

from .draw import DTYPES, Draw, case, close, normal, poisoned


@dataclass
class Ragged:
    """A batch of (queries, context) and the shuffled pages that the contexts lie in; tables are -1 beyond them."""

    lengths: list[tuple[int, int]]
    block_size: int
    blocks: int
    tables: Tensor
    starts: Tensor
    contexts: Tensor

    def places(self, sequence: int) -> tuple[Tensor, Tensor]:
        """Block and offset of each of a sequence's keys."""
        token = torch.arange(self.lengths[sequence][1])
        return self.tables[sequence].cpu()[token // self.block_size].long(), token % self.block_size

    def fill(self, cache: Tensor) -> Tensor:
        """Put numbers where the contexts lie, [blocks, ..., B, D]; all else stays NaN, so that reading it shows."""
        numbers = torch.randn(cache.shape, generator=torch.Generator().manual_seed(cache.numel())).to(cache)
        used = torch.zeros(self.blocks, self.block_size, dtype=torch.bool)
        for sequence in range(len(self.lengths)):
            used[self.places(sequence)] = True
        used = used.view(self.blocks, *(1,) * (cache.dim() - 3), self.block_size, 1).to(cache.device)
        return cache.copy_(torch.where(used, numbers, cache))


@dataclass
class Settings:
    """What a layer asks for besides, as `paged_attention` takes it, and what that means for one query."""

    window: int | None = None
    softcap: float | None = None
    slopes: Tensor | None = None
    visible: Tensor | None = None
    causal: bool = True
    ranges: Tensor | None = None
    sinks: Tensor | None = None

    def seen(self, sequence: int, query: int, place: int, context: int) -> list[int]:
        """The keys that a query sees; `query` is its number in the batch, `place` where it stands in its sequence."""
        if not self.causal:
            first, end = (0, context) if self.ranges is None else self.ranges[query].tolist()
            return [key for key in range(context) if first <= key < end]
        prefix = 0 if self.visible is None else int(self.visible[sequence])
        within = range(min(prefix, context)) if place < prefix else range(0)
        last = range(max(0, place + 1 - (self.window or place + 1)), place + 1)
        return sorted({*within, *last})

    def weighed(self, scores: Tensor, keys: Tensor) -> Tensor:
        """[Hq, keys]: how much each key counts."""
        scores = self.scored(scores, keys)
        if self.sinks is None:
            return scores.softmax(-1)
        return torch.cat((scores, self.sinks.cpu().double()[:, None]), 1).softmax(-1)[:, :-1]

    def scored(self, scores: Tensor, keys: Tensor) -> Tensor:
        """[Hq, keys]: what becomes of scaled scores of keys at these places."""
        if self.softcap is not None:
            scores = self.softcap * (scores / self.softcap).tanh()
        if self.slopes is None:
            return scores
        slopes = self.slopes.cpu()
        return scores + (slopes[:, None] * keys.to(slopes.dtype)).double()


def ragged(draw: Draw, device: torch.device, is_cross: bool = False) -> Ragged:
    """Decode and prefill mixed, empty sequences among them; across, the keys have nothing to do with the queries."""
    lengths = []
    for _ in range(draw.integer(1, 4)):
        queries = draw.choice((0, 1, 1, draw.integer(2, 21)))
        before = draw.choice((0, draw.integer(0, 20), draw.integer(0, 150)))
        lengths.append((queries, before if is_cross else queries + before))
    block_size = draw.choice((1, 5, 16))
    pages = [-(-context // block_size) for _, context in lengths]
    blocks = sum(pages) + 2
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(draw.integer(0, 2**31))).int()
    tables = torch.full((len(lengths), max(pages) + draw.integer(0, 2)), -1, dtype=torch.int32)
    for sequence, (count, end) in enumerate(zip(pages, accumulate(pages), strict=True)):
        tables[sequence, :count] = order[end - count : end]
    starts = torch.tensor([0, *accumulate(queries for queries, _ in lengths)], dtype=torch.int32)
    contexts = torch.tensor([context for _, context in lengths], dtype=torch.int32)
    return Ragged(lengths, block_size, blocks, tables.to(device), starts.to(device), contexts.to(device))


def settings(draw: Draw, batch: Ragged, heads: int, is_causal: bool, device: torch.device) -> Settings:
    """Any that go together; half of the batches have none."""
    chosen = Settings(causal=is_causal)
    if draw.choice((True, False)):
        return chosen
    if draw.choice((True, False)):
        chosen.softcap = draw.choice((2.0, 30.0))
    if draw.choice((True, False)):
        kind = draw.choice(DTYPES)
        chosen.slopes = (2.0 ** -torch.linspace(0.5, 8, heads)).to(kind).to(device)
    if draw.choice((True, False)):
        kind = draw.choice(DTYPES)
        chosen.sinks = (normal(draw, heads, dtype=torch.float32, device=device) * 4).to(kind)
    if is_causal and draw.choice((True, False)):
        chosen.window = draw.choice((1, 7, draw.integer(1, 200)))
    if is_causal and draw.choice((True, False)):
        prefixes = [draw.choice((0, draw.integer(0, context), context + 9)) for _, context in batch.lengths]
        chosen.visible = torch.tensor(prefixes, dtype=torch.int32, device=device)
    if not is_causal and draw.choice((True, False)):
        ends = [context for queries, context in batch.lengths for _ in range(queries)]
        beyond = draw.choice((0, 5))
        ranges = [(draw.integer(-beyond, end), draw.integer(0, end + beyond)) for end in ends]  # none where they cross
        chosen.ranges = torch.tensor(ranges, dtype=torch.int32, device=device).view(-1, 2)
    return chosen


def forget(batch: Ragged, window: int | None, visible: Tensor | None, *caches: Tensor) -> None:
    """Of pages that lie before every window of their sequence nothing may be read: neither the id nor the numbers."""
    if window is None:
        return
    for sequence, (queries, context) in enumerate(batch.lengths):
        place = context - queries
        if visible is None or place >= int(visible[sequence]):
            gone = max(0, place - window + 1) // batch.block_size
            for cache in caches:
                cache[batch.tables[sequence, :gone].long()] = float("nan")
            batch.tables[sequence, :gone] = 2**31 - 1


def near(
    found: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Ragged, scale: float, settings: Settings
) -> None:
    """Compare with attention one query at a time; the caches [blocks, Hk, B, D] are copies from before `forget`."""
    heads, kv_heads = q.shape[1], k_cache.shape[1]
    wanted = torch.zeros(found.shape, dtype=torch.float64)
    sizes = torch.zeros(*found.shape[:2], 1, dtype=torch.float64)
    query = 0
    for sequence, (queries, context) in enumerate(batch.lengths):
        block, offset = batch.places(sequence)
        k, v = (cache.cpu()[block, :, offset].double().transpose(0, 1) for cache in (k_cache, v_cache))
        for row in range(queries):
            keys = torch.tensor(settings.seen(sequence, query, context - queries + row, context), dtype=torch.long)
            if len(keys):
                rows = q[query].cpu().double().view(kv_heads, heads // kv_heads, -1)
                scores = (rows @ k[:, keys].transpose(1, 2) * scale).flatten(0, 1)
                weights = settings.weighed(scores, keys).view(kv_heads, -1, len(keys))
                wanted[query] = (weights @ v[:, keys]).flatten(0, 1)
                sizes[query] = (weights @ v[:, keys].abs()).mean(-1, keepdim=True).flatten(0, 1)
            query += 1
    close(found, wanted, sizes)


@case
def paged_attention(draw: Draw, device: torch.device) -> None:
    """Any batch, heads, pages and settings; q in a wider buffer, caches with room between their blocks."""
    dtype, is_causal = draw.choice(DTYPES), draw.choice((True, True, False))
    kv_heads, group = draw.choice((1, 2, 3)), draw.integer(1, 8)
    width = draw.choice((32, 64, 80, 96, 128, 256, draw.integer(1, 200)))
    batch = ragged(draw, device, not is_causal)
    heads, tokens = kv_heads * group, int(batch.starts[-1])
    chosen = settings(draw, batch, heads, is_causal, device)
    q = normal(draw, tokens, heads + draw.choice((0, 2)), width, dtype=dtype, device=device)[:, :heads]
    both = poisoned(batch.blocks, 2, kv_heads, batch.block_size, width, dtype=dtype, device=device)
    caches = [cache.contiguous() if draw.choice((True, False)) else cache for cache in both.unbind(1)]
    k_cache, v_cache = (batch.fill(cache) for cache in caches)
    kept = batch.tables.clone(), k_cache.clone(), v_cache.clone()
    forget(batch, chosen.window, chosen.visible, k_cache, v_cache)
    out = poisoned(tokens, heads, width, dtype=dtype, device=device) if draw.choice((True, False)) else None
    tables = (batch.tables.clone(), batch.starts, batch.contexts)
    scale = draw.choice((1, 1, -1)) * width**-0.5
    y = attend(q, k_cache, v_cache, *tables, scale, **vars(chosen), out=out)
    assert out is None or y is out
    batch.tables = kept[0]
    near(y, q, *kept[1:], batch, scale, chosen)


@case
def latent_attention(draw: Draw, device: torch.device) -> None:
    """Rows that are the key and, in their beginning, the value of all heads, however many."""
    dtype, heads = draw.choice(DTYPES), draw.choice((1, 4, 16, draw.integer(1, 40)))
    width, values = draw.choice(((72, 64), (96, 64), (40, 28), (33, 33), (144, 128)))
    batch = ragged(draw, device)
    q = normal(draw, int(batch.starts[-1]), heads, width, dtype=dtype, device=device)
    cache = batch.fill(poisoned(batch.blocks, batch.block_size, width, dtype=dtype, device=device))
    out = poisoned(len(q), heads, values, dtype=dtype, device=device) if draw.choice((True, False)) else None
    y = attend_rows(q, cache, values, batch.tables, batch.starts, batch.contexts, width**-0.5, out=out)
    assert out is None or y is out
    near(y, q, cache[:, None], cache[:, None, :, :values], batch, width**-0.5, Settings())
