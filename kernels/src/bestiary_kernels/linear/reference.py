"""The packed bfloat16 layout in torch: what the C++ product and row reader mean.

A packed weight is [ceil(N / 64)][K / 2][64][2]: blocks of 64 outputs, in each the inputs two by two.
"""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["COLUMNS", "embedding_packed", "linear_packed", "pack", "packed_shape"]

COLUMNS = 64


def packed_shape(outputs: int, inputs: int) -> tuple[int, int, int, int]:
    """The four dimensions of a packed [outputs, inputs] weight; inputs must be even."""
    return (-(-outputs // COLUMNS), inputs // 2, COLUMNS, 2)


def pack(weight: Tensor) -> Tensor:
    """A weight [N, K] in the packed layout; the rows that fill the last block are zeros."""
    blocks, steps, _, _ = packed_shape(*weight.shape)
    padded = functional.pad(weight, (0, 0, 0, blocks * COLUMNS - weight.shape[0]))
    return padded.view(blocks, COLUMNS, steps, 2).transpose(1, 2).contiguous()


def embedding_packed(packed: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` (int64 [T], inside the weight) of a packed weight: [T, K]."""
    return packed[ids // COLUMNS, :, ids % COLUMNS].flatten(1)


def linear_packed(packed: Tensor, x_TK: Tensor, bias_N: Tensor | None, outputs: int) -> Tensor:
    """x_TK times the packed weight, plus the bias, in float32 and rounded once: [T, outputs]."""
    rows = embedding_packed(packed, torch.arange(outputs))
    y = x_TK.float() @ rows.float().T
    return (y if bias_N is None else y + bias_N.float()).to(x_TK.dtype)
