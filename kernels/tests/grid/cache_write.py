"""The write of latent rows to their cache."""

import torch

from bestiary_kernels import cache_write

from .draw import DTYPES, Draw, case, poisoned, within


@case
def latent_cache_write(draw: Draw, device: torch.device) -> None:
    """Rows, perhaps of a wider buffer, to shuffled slots of which some are none; the cache is poison elsewhere."""
    dtype, tokens, block_size = draw.choice((*DTYPES, torch.float16)), draw.integer(0, 9), draw.choice((1, 5, 16))
    width = draw.choice((1, 64, 576, draw.integer(1, 70)))
    rows = within(draw, tokens, width, more=(0, 0, 3), dtype=dtype, device=device)
    blocks = tokens // block_size + draw.integer(1, 3)
    generator = torch.Generator().manual_seed(draw.integer(0, 999))
    slots = torch.randperm(blocks * block_size, generator=generator)[:tokens].to(device)
    for token in range(tokens):
        if draw.choice((True, False, False, False)):
            slots[token] = -1
    shape = (blocks, draw.choice((1, 2)), block_size, width)
    cache = poisoned(*shape[:3], width + draw.choice((0, 0, 5)), dtype=dtype, device=device)[:, 0, :, :width]
    cache_write(rows, slots, cache)
    wanted = poisoned(*cache.shape, dtype=dtype, device=device)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            wanted[slot // block_size, slot % block_size] = rows[token]
    assert torch.equal(cache.nan_to_num(nan=99.0), wanted.nan_to_num(nan=99.0))
