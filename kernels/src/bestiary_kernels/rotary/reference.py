"""Rotary embedding, and cache write, in torch: the meaning of `rotary` and `rotary_cache_write`."""

import torch
from torch import Tensor

from bestiary_kernels import library

__all__ = ["rotary", "rotary_cache_write"]


def _rotate(x: Tensor, cos_sin_T2R: Tensor, interleaved: bool) -> None:
    """Rotate x [T, H, D] in place by the angles [T, 2, R/2]; dimensions from R on stay."""
    half = cos_sin_T2R.shape[-1]
    cos, sin = cos_sin_T2R[:, None, 0], cos_sin_T2R[:, None, 1]
    turned = x[..., : 2 * half]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    a, b = first.float(), second.float()
    turned_first, turned_second = a * cos - b * sin, b * cos + a * sin  # both before either is written: a may be first
    first.copy_(turned_first)
    second.copy_(turned_second)


def _angles(operation: str, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """The table's rows of the positions, [T, 2, R/2]."""
    if bool(((positions < 0) | (positions >= cos_sin.shape[0])).any()):
        library.fail(operation, library.BAD_POSITION)
    return cos_sin[positions]


def rotary(x: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool = False) -> Tensor:
    """Return x rotated (Su et al., arXiv 2104.09864), in float32 and rounded once. Raises IndexError as its caller."""
    y = x.clone(memory_format=torch.contiguous_format)
    _rotate(y, _angles("rotary", cos_sin, positions), interleaved)
    return y


def rotary_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    interleaved: bool = False,
) -> None:
    """Rotate q and k in place (Su et al., arXiv 2104.09864), then write k and v to their slots.

    A negative slot is not written. Rotation in float32, rounded once. Raises IndexError before anything is written.
    """
    blocks, _, block_size, _ = k_cache.shape
    if bool((slots >= blocks * block_size).any()):
        library.fail("rotary_cache_write", library.BAD_SLOT)
    if cos_sin is not None:
        angles = _angles("rotary_cache_write", cos_sin, positions)
        _rotate(q, angles, interleaved)
        _rotate(k, angles, interleaved)
    written = torch.nonzero(slots >= 0).squeeze(-1)
    block, offset = slots[written] // block_size, slots[written] % block_size
    k_cache[block, :, offset] = k[written]
    v_cache[block, :, offset] = v[written]
