"""Rows of a table in Triton, whatever their type: copied as whole numbers of its size."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["embedding"]

_LONGEST = 2048
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@triton.jit
def _embedding(table, ids, y, rows, width, row_stride, column_stride, id_stride, BLOCK: tl.constexpr):
    pieces = tl.cdiv(width, BLOCK)
    token = (tl.program_id(0) // pieces).to(tl.int64)
    at = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + token * id_stride)
    there = tl.where((row >= 0) & (row < rows), width, 0)
    found = tl.load(table + row * row_stride + at.to(tl.int64) * column_stride, mask=at < there, other=0)
    tl.store(y + token * width + at, found, mask=at < width)


def embedding(table: Tensor, ids: Tensor) -> Tensor:
    """As the reference, with zeros for an id that is no row's."""
    whole = table.view(_WHOLE.get(table.element_size(), torch.int64))
    rows, width = whole.shape
    y = torch.empty((ids.shape[0], width), dtype=whole.dtype, device=table.device)
    block = min(_LONGEST, triton.next_power_of_2(max(width, 1)))
    if y.numel():
        grid = (ids.shape[0] * triton.cdiv(width, block),)
        _embedding[grid](whole, ids, y, rows, width, *whole.stride(), ids.stride(0), BLOCK=block)
    return y.view(table.dtype)
