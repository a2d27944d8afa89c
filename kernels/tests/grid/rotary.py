"""Rotary embedding, alone and with the cache write."""

import math

import torch
from torch import Tensor

from bestiary_kernels import rotary, rotary_cache_write

from .draw import DTYPES, Draw, apart, case, close, normal, poisoned


def _table(draw: Draw, rotary_width: int, device: torch.device) -> Tensor:
    """cos_sin [positions, 2, R / 2]: of angles that no formula makes, as a stretch may ask for any."""
    angles = normal(draw, draw.integer(1, 30), rotary_width // 2, dtype=torch.float32, device=device) * math.pi
    return torch.stack((angles.cos(), angles.sin()), 1)


def _turned(x: Tensor, rows: Tensor, interleaved: bool) -> Tensor:
    """x [T, H, D] turned by rows [T, 2, R / 2] of the table, in float64."""
    half = rows.shape[2]
    cos, sin = rows.double()[:, None].unbind(2)
    y = x.double().clone()
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    a, b = x[..., first].double(), x[..., second].double()
    y[..., first], y[..., second] = a * cos - b * sin, b * cos + a * sin
    return y


def _positions(draw: Draw, tokens: int, table: Tensor) -> Tensor:
    places = [draw.integer(0, len(table) - 1) for _ in range(tokens)]
    return apart(draw, torch.tensor(places, dtype=torch.int64, device=table.device))


def _widths(draw: Draw) -> tuple[int, int]:
    """Of a head, and of the part of it that turns."""
    width = draw.choice((2, 64, 80, 256, draw.integer(2, 40)))
    return width, draw.choice((width // 2 * 2, draw.integer(1, width // 2) * 2))


@case
def rotation_alone(draw: Draw, device: torch.device) -> None:
    """Of a slice of each head in a wider buffer, into memory of its own."""
    dtype, tokens, heads, (width, turned) = draw.choice(DTYPES), draw.integer(0, 6), draw.integer(1, 9), _widths(draw)
    skipped, interleaved = draw.choice((0, 3)), draw.choice((True, False))
    whole = normal(draw, tokens, heads, width + skipped, dtype=dtype, device=device)
    x, before, table = whole[..., skipped:], whole.clone(), _table(draw, turned, device)
    positions = _positions(draw, tokens, table)
    wider = poisoned(tokens, heads, width + 2, dtype=dtype, device=device)
    out = wider[..., 1:-1] if draw.choice((True, False)) else None
    y = rotary(x, table, positions, interleaved, out)
    wanted = _turned(x, table[positions], interleaved)
    assert torch.equal(whole, before)
    assert y.is_contiguous() if out is None else y is out and wider[..., [0, -1]].isnan().all()
    assert torch.equal(y[..., turned:], x[..., turned:])
    close(y, wanted)


@case
def rotation_and_cache_write(draw: Draw, device: torch.device) -> None:
    """q, k and v together or apart, shuffled slots of which some are none, and caches that are poison elsewhere."""
    dtype, tokens, (width, turned) = draw.choice(DTYPES), draw.integer(0, 6), _widths(draw)
    kv_heads, block_size = draw.choice((1, 2, 3, 9)), draw.choice((1, 5, 16))
    q_heads = kv_heads * draw.integer(1, 4)
    table = _table(draw, turned, device) if draw.choice((True, True, False)) else None
    interleaved = draw.choice((True, False))
    fused = normal(draw, tokens, q_heads + 2 * kv_heads, width + draw.choice((0, 0, 3)), dtype=dtype, device=device)
    q, k, v = fused[..., :width].split((q_heads, kv_heads, kv_heads), 1)
    q, v = (part.clone() if draw.choice((True, False)) else part for part in (q, v))
    before = [part.clone() for part in (q, k, v)]
    positions = _positions(draw, tokens, torch.empty(9, device=device) if table is None else table)
    blocks = tokens // block_size + draw.integer(1, 3)
    generator = torch.Generator().manual_seed(draw.integer(0, 999))
    slots = torch.randperm(blocks * block_size, generator=generator)[:tokens].to(device)
    for token in range(tokens):
        if draw.choice((True, False, False, False)):
            slots[token] = -1
    slots = apart(draw, slots)
    both = poisoned(blocks, 2, kv_heads, block_size, width, dtype=dtype, device=device)
    k_cache, v_cache = (cache.contiguous() if draw.choice((True, False)) else cache for cache in both.unbind(1))
    rotary_cache_write(q, k, v, table, positions, slots, k_cache, v_cache, interleaved)
    for part, old in zip((q, k), before[:2], strict=True):
        close(part, old.double() if table is None else _turned(old, table[positions], interleaved))
        assert torch.equal(part[..., turned:], old[..., turned:])
    assert torch.equal(v, before[2])
    for part, cache in ((k, k_cache), (v, v_cache)):
        wanted = poisoned(*cache.shape, dtype=dtype, device=device)
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                wanted[slot // block_size, :, slot % block_size] = part[token]
        assert torch.equal(cache.nan_to_num(nan=99.0), wanted.nan_to_num(nan=99.0))
