"""Convolutions and scans of state spaces, of a decode step and of prompts: Mamba 2.8B's sizes, and odd ones."""

import torch
from torch import Tensor

from bestiary_kernels import causal_conv, selective_scan


def _slots(sequences: int, tokens: int) -> tuple[Tensor, ...]:
    read, starts = torch.arange(sequences), torch.linspace(0, tokens, sequences + 1).int()
    return read, read + sequences, starts, torch.zeros(sequences, dtype=torch.bool)


def _convolution(sequences: int, tokens: int, taps: int, dtype: torch.dtype, act: str | None) -> None:
    x = torch.empty(tokens, 10240, dtype=dtype)[:, :5120]
    states = torch.empty(2 * sequences, 5120, taps - 1, dtype=dtype)
    weight, bias = torch.empty(5120, taps, dtype=dtype), torch.empty(5120, dtype=dtype)
    causal_conv(x, weight, bias if taps > 2 else None, states, *_slots(sequences, tokens), act)


def _scan(sequences: int, tokens: int, numbers: int, dtype: torch.dtype, gated: bool) -> None:
    xz, dt, bc = (torch.empty(tokens, width, dtype=dtype) for width in (10240, 5120, 160 + 2 * numbers))
    (x, z), (_, b, c) = xz.split(5120, 1), bc.split((160, numbers, numbers), 1)
    a, d, states = torch.empty(5120, numbers), torch.empty(5120), torch.empty(2 * sequences, 5120, numbers)
    selective_scan(x, dt, a, b, c, d, states, *_slots(sequences, tokens), z if gated else None, gated)


def convolutions() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        _convolution(8, 8, 4, dtype, "silu")
        _convolution(3, 512, 4, dtype, "silu")
    _convolution(1, 1, 2, torch.bfloat16, None)
    _convolution(2, 64, 1, torch.float32, "gelu")


def scans() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        _scan(8, 8, 16, dtype, True)
        _scan(3, 512, 16, dtype, False)
    _scan(1, 1, 128, torch.bfloat16, True)
    _scan(2, 64, 1, torch.float32, True)
