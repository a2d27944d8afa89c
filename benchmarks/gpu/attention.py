"""Attention alone: paged decode at many batch sizes and contexts, prefill, latent rows, against the device's limits."""

from collections.abc import Iterator

import torch

from bestiary_kernels import latent_attention, paged_attention
from gpu.device import Device
from gpu.rows import Row

__all__ = ["rows"]

_HEADS, _KV_HEADS, _WIDTH, _PAGE = 32, 8, 128, 16
#: (batch, context) whose keys and values take 256 MB and more.
_DECODES = ((1, 65536), (8, 8192), (32, 4096), (64, 4096), (128, 2048))
_NEIGHBOURS = (*range(1, 18), 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 126, 127, 128)


def rows(device: Device) -> Iterator[Row]:
    """Each measured alone, over blocks in random order."""
    small = device.is_tiny
    for batch, context in ((1, 64), (3, 33)) if small else _DECODES:
        yield _decode(device, batch, context)
    yield _neighbours(device, (1, 2, 3) if small else _NEIGHBOURS, 64 if small else 8192)
    for batch, tokens in ((1, 32), (2, 16)) if small else ((1, 2048), (4, 2048), (1, 8192)):
        yield _prefill(device, batch, tokens)
    yield _latent(device, *((2, 32) if small else (64, 4096)))


class _Batch:
    def __init__(self, device: Device, batch: int, queries: int, context: int, heads: int, width: int) -> None:
        pages = -(-context // _PAGE)
        kind = device.kind
        order = torch.randperm(batch * pages).to(torch.int32)
        self.tables = order.view(batch, pages).to(kind)
        self.starts = torch.arange(0, batch * queries + 1, queries, dtype=torch.int32, device=kind)
        self.lens = torch.full((batch,), context, dtype=torch.int32, device=kind)
        self.q = torch.randn(batch * queries, heads, width, dtype=torch.bfloat16, device=kind)
        self.blocks = batch * pages

    def cache(self, *shape: int) -> torch.Tensor:
        return torch.randn(self.blocks, *shape, dtype=torch.bfloat16, device=self.q.device)


def _call(device: Device, batch: int, queries: int, context: int) -> float:
    one = _Batch(device, batch, queries, context, _HEADS, _WIDTH)
    k, v = (one.cache(_KV_HEADS, _PAGE, _WIDTH) for _ in range(2))
    return device.seconds(lambda: paged_attention(one.q, k, v, one.tables, one.starts, one.lens, _WIDTH**-0.5))


def _decode(device: Device, batch: int, context: int) -> Row:
    size = batch * context * 2 * _KV_HEADS * _WIDTH * 2
    rate = size / _call(device, batch, 1, context)
    name = f"decode attention, {batch} x {context:,} tokens ({size / 2**20:.0f} MiB)"
    return Row(name, rate / 1e9, "GB/s", rate / device.bandwidth, "copy", 0.75)


def _neighbours(device: Device, batches: tuple[int, ...], context: int) -> Row:
    """The worst step between batch sizes that stand beside each other, beyond the work that is added."""
    times = {batch: _call(device, batch, 1, context) for batch in batches}
    steps = {b: times[b + 1] / times[b] / max(1.0, (b + 1) / b) for b in times if b + 1 in times}
    worst = max(steps, key=steps.__getitem__)
    name = f"decode attention, worst step of a batch ({worst} to {worst + 1}, {context:,} tokens), beyond its work"
    return Row(name, steps[worst], "x", goal=1.15, is_ceiling=True)


def _prefill(device: Device, batch: int, tokens: int) -> Row:
    rate = batch * 4 * tokens * tokens / 2 * _HEADS * _WIDTH / _call(device, batch, tokens, tokens)
    return Row(
        f"prefill attention, {batch} x {tokens:,} tokens", rate / 1e12, "TFLOP/s", rate / device.flops, "matmul", 0.5
    )


def _latent(device: Device, batch: int, context: int) -> Row:
    heads, width, values = 16, 576, 512
    one = _Batch(device, batch, 1, context, heads, width)
    cache = one.cache(_PAGE, width)
    size = batch * context * width * 2
    seconds = device.seconds(
        lambda: latent_attention(one.q, cache, values, one.tables, one.starts, one.lens, width**-0.5)
    )
    rate = size / seconds
    name = f"latent attention, {batch} x {context:,} tokens ({size / 2**20:.0f} MiB)"
    return Row(name, rate / 1e9, "GB/s", rate / device.bandwidth, "copy")
