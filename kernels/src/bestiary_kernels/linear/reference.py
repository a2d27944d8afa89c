"""The packed bfloat16 layouts in torch: what the C++ product and row reader mean.

A packed weight is [ceil(N / 64)][K / 2][64][2]: blocks of 64 outputs, in each the inputs two by two. Squeezed, the 128
weights of a step are 192 bytes: the signs and mantissas of the first half and of the second, and codes of exponents,
of the first half in the lower four bits. Within a half weights 8 i + j and 32 + 8 i + j are bytes 16 i + j and
16 i + 8 + j.
"""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "COLUMNS",
    "SQUEEZED_BYTES",
    "SQUEEZED_TILE",
    "embedding_packed",
    "linear_packed",
    "pack",
    "packed_shape",
    "unsqueeze",
]

COLUMNS = 64
#: Bytes of a squeezed step, and steps whose exceptions are listed together.
SQUEEZED_BYTES, SQUEEZED_TILE = 192, 32


def packed_shape(outputs: int, inputs: int) -> tuple[int, int, int, int]:
    """The four dimensions of a packed [outputs, inputs] weight; inputs must be even."""
    return (-(-outputs // COLUMNS), inputs // 2, COLUMNS, 2)


def pack(weight: Tensor) -> Tensor:
    """A weight [N, K] in the packed layout; the rows that fill the last block are zeros."""
    blocks, steps, _, _ = packed_shape(*weight.shape)
    missing = blocks * COLUMNS - weight.shape[0]
    padded = functional.pad(weight, (0, 0, 0, missing)) if missing else weight
    return padded.view(blocks, COLUMNS, steps, 2).transpose(1, 2).contiguous()


def embedding_packed(packed: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` (int64 [T], inside the weight) of a packed weight: [T, K]."""
    return packed[ids // COLUMNS, :, ids % COLUMNS].flatten(1)


def linear_packed(packed: Tensor, x_TK: Tensor, bias_N: Tensor | None, outputs: int) -> Tensor:
    """x_TK times the packed weight, plus the bias, in float32 and rounded once: [T, outputs]."""
    rows = embedding_packed(packed, torch.arange(outputs))
    y = x_TK.float() @ rows.float().T
    return (y if bias_N is None else y + bias_N.float()).to(x_TK.dtype)


def unsqueeze(codes: Tensor, exponents: Tensor, starts: Tensor, exceptions: Tensor) -> Tensor:
    """The packed weight of codes uint8 [blocks, K / 2, 192] of sixteen exponents, of which exceptions are others.

    `exceptions` int32 are place << 16 | bits, the place one among a tile's weights; `starts` [tiles + 1] says which are
    whose.
    """
    blocks, steps, _ = codes.shape
    rest, both = codes[..., :128].int(), codes[..., 128:]
    exponent = exponents.int()[torch.cat((both & 15, both >> 4), -1).int()]
    bits = (rest & 128) << 8 | exponent << 7 | rest & 127
    # Bytes as they lie to weights as they lie.
    bits = bits.view(blocks, steps, 2, 4, 2, 8).transpose(-3, -2).reshape(blocks, steps, 2 * COLUMNS)
    tiles = -(-steps // SQUEEZED_TILE)
    tile = torch.repeat_interleave(torch.arange(blocks * tiles), starts.diff().long())
    listed = exceptions[: tile.numel()].long() & 0xFFFFFFFF
    step = tile % tiles * SQUEEZED_TILE + (listed >> 16) // (2 * COLUMNS)
    bits[tile // tiles, step, (listed >> 16) % (2 * COLUMNS)] = (listed & 0xFFFF).int()
    return bits.to(torch.int16).view(torch.bfloat16).view(blocks, steps, COLUMNS, 2)
