"""Attention over pages, and latent attention, with the settings that models have."""

from typing import Any

import torch

from bestiary_kernels import latent_attention, paged_attention

AHEAD = ("llama_decodes", "llama_reads", "a_chunk_joins_others", "slopes_and_a_prefix", "deepseek_decodes")
FEW, MANY = (8, 8), (2048, 4)


def _call(
    sizes: tuple[int, int], q_heads: int, kv_heads: int, width: int, page: int, dtype: torch.dtype, **settings: Any
) -> None:
    tokens, sequences = sizes
    q = torch.empty(tokens, q_heads, width, dtype=dtype)
    caches = (torch.empty(16, kv_heads, page, width, dtype=dtype) for _ in range(2))
    batch = [torch.empty(shape, dtype=torch.int32) for shape in ((sequences, 4096), (sequences + 1,), (sequences,))]
    paged_attention(q, *caches, *batch, 0.1, **settings)


def _latent(sizes: tuple[int, int], heads: int, width: int, values: int, dtype: torch.dtype) -> None:
    tokens, sequences = sizes
    batch = [torch.empty(shape, dtype=torch.int32) for shape in ((sequences, 4096), (sequences + 1,), (sequences,))]
    q, rows = torch.empty(tokens, heads, width, dtype=dtype), torch.empty(16, 64, width, dtype=dtype)
    latent_attention(q, rows, values, *batch, 0.1)


def llama_decodes() -> None:
    _call(FEW, 32, 8, 128, 16, torch.bfloat16)


def llama_reads() -> None:
    _call(MANY, 32, 8, 128, 16, torch.bfloat16)


def a_chunk_joins_others() -> None:
    _call((12, 8), 14, 2, 64, 64, torch.float16)


def a_wide_head_with_a_window_and_a_cap() -> None:
    for sizes in (FEW, MANY):
        _call(sizes, 8, 4, 256, 5, torch.bfloat16, window=4096, softcap=50.0)


def slopes_and_a_prefix() -> None:
    slopes, visible = torch.empty(32, dtype=torch.bfloat16), torch.empty(4, dtype=torch.int32)
    _call(MANY, 32, 32, 80, 16, torch.bfloat16, slopes=slopes, visible=visible, window=512)


def ranges_of_pictures() -> None:
    ranges = torch.empty(2048, 2, dtype=torch.int32)
    _call(MANY, 32, 8, 128, 16, torch.bfloat16, causal=False, ranges=ranges)
    _call(FEW, 32, 8, 128, 16, torch.bfloat16, causal=False)


def sinks() -> None:
    for sizes in (FEW, MANY):
        _call(sizes, 64, 8, 64, 16, torch.bfloat16, window=128, sinks=torch.empty(64, dtype=torch.bfloat16))


def in_full() -> None:
    for sizes in (FEW, MANY):
        _call(sizes, 32, 8, 128, 16, torch.float32)
        _call(sizes, 71, 1, 24, 1, torch.float32, softcap=3.0, slopes=torch.empty(71))


def deepseek_decodes() -> None:
    _latent(FEW, 16, 576, 512, torch.bfloat16)


def deepseek_reads() -> None:
    for sizes in (FEW, MANY):
        _latent(sizes, 128, 576, 512, torch.bfloat16)


def narrow_latent_rows() -> None:
    _latent(MANY, 6, 72, 64, torch.float16)
    _latent(FEW, 6, 40, 28, torch.float32)
