"""Low-rank adapters, of a decode step and of a prompt."""

import torch

from bestiary_kernels import lora


def _adapters(rows: int, rank: int, dtype: torch.dtype) -> None:
    y, x = torch.empty(rows, 6144, dtype=dtype), torch.empty(rows, 4096, dtype=dtype)
    slots, ranks = torch.zeros(rows, dtype=torch.int32), torch.zeros(8, 3, dtype=torch.int32)
    down, up = torch.empty(8, 3, rank, 4096, dtype=dtype), torch.empty(8, rank, 6144, dtype=dtype)
    lora(y, x, slots, down, up, ranks, torch.tensor([0, 4096, 5120, 6144], dtype=torch.int32))


def of_few_rows() -> None:
    _adapters(8, 16, torch.bfloat16)
    _adapters(8, 8, torch.float32)


def of_many_rows() -> None:
    _adapters(2048, 64, torch.bfloat16)
    _adapters(2048, 20, torch.float16)
    _adapters(2048, 16, torch.float32)
