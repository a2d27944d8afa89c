"""Norms."""

import torch

from bestiary_kernels import add_rms_norm


def alone() -> None:
    add_rms_norm(torch.empty(8, 4096), None, torch.empty(4096), 1e-5)


def with_residual() -> None:
    x = torch.empty(8, 5120, dtype=torch.bfloat16)
    add_rms_norm(x, torch.empty_like(x), torch.empty(5120, dtype=torch.bfloat16), 1e-5)


def of_heads_in_a_wider_buffer() -> None:
    qkv = torch.empty(8, 40, 128, dtype=torch.float16)
    add_rms_norm(qkv[:, :32], None, torch.empty(128, dtype=torch.float16), 1e-6)
