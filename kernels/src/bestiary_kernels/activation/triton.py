"""Activations in Triton: a program computes a piece of a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bestiary_kernels.overlap.triton import overlapping, release_next, wait_for_last

__all__ = ["activated", "activation", "gated_activation"]

_LONGEST = 1024


@triton.jit
def _sigmoid(x):
    """Of float32; nothing overflows on the way, and small values keep their digits."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def activated(x, KIND: tl.constexpr) -> tl.tensor:
    """Act on float32."""
    if KIND == "silu":
        y = x * _sigmoid(x)
    elif KIND == "gelu":
        y = 0.5 * x * (1 + tl.math.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # x (1 + tanh u) / 2 is x sigmoid(2u)
        y = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "quick_gelu":
        y = x * _sigmoid(1.702 * x)
    else:
        y = tl.where(x < 0, 0.0, x)  # a NaN is not below zero and stays
        if KIND == "relu2":
            y = y * y
    return y


@triton.jit
def _activate(
    x, y, width, row_stride, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr
):  # fmt: skip
    release_next(OVERLAPS)
    wait_for_last(OVERLAPS)
    pieces = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    at = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    x += row * row_stride
    value = activated(tl.load(x + at, mask=at < width, other=0.0).to(tl.float32), KIND)
    if GATED:
        value *= tl.load(x + width + at, mask=at < width, other=0.0).to(tl.float32)
    tl.store(y + row * width + at, value.to(y.dtype.element_ty), mask=at < width)


def _launch(x: Tensor, y: Tensor, rows: int, width: int, row_stride: int, kind: str, gated: bool) -> Tensor:
    block = min(_LONGEST, triton.next_power_of_2(max(width, 1)))
    if y.numel():
        grid = (rows * triton.cdiv(width, block),)
        _activate[grid](x, y, width, row_stride, KIND=kind, GATED=gated, BLOCK=block, **overlapping(x))
    return y


def activation(x: Tensor, kind: str) -> Tensor:
    """As the reference."""
    x = x.contiguous()
    # A kernel is compiled for what it is told of the width, so the tokens must not be part of it.
    rows = x.shape[0] if x.dim() > 1 else 1
    width = x.numel() // max(rows, 1)
    return _launch(x, torch.empty_like(x), rows, width, width, kind, False)


def gated_activation(gate_up: Tensor, kind: str) -> Tensor:
    """As the reference."""
    *outer, both = gate_up.shape
    flat = gate_up if len(outer) == 1 and gate_up.stride(1) == 1 else gate_up.reshape(-1, both).contiguous()
    y = torch.empty((*outer, both // 2), dtype=gate_up.dtype, device=gate_up.device)
    return _launch(flat, y, flat.shape[0], both // 2, flat.stride(0), kind, True)
