"""Routers and mixtures of experts, of a decode step and of a prompt."""

import torch

from bestiary_kernels import experts_linear, moe, route


def softmax_router() -> None:
    route(torch.empty(8, 8, dtype=torch.bfloat16), 2, renormalise=True)
    route(torch.empty(8, 32, dtype=torch.float16), 4, renormalise=False, softmax_last=True)


def grouped_router() -> None:
    route(torch.empty(8, 160), 6, renormalise=False, groups=8, top_groups=3, scale=16.0)
    route(
        torch.empty(8, 256),
        8,
        renormalise=True,
        scale=2.5,
        groups=8,
        top_groups=4,
        scoring="sigmoid",
        bias_E=torch.empty(256),
        group_by="best_two",
    )


def sparsemixer_router() -> None:
    route(torch.empty(8, 16, dtype=torch.bfloat16), 2, renormalise=False, scoring="sparsemixer", jitter=0.01)


def _mixture(tokens: int, experts: int, top_k: int, width: int, inner: int, dtype: torch.dtype) -> None:
    # Never touched, so they take no memory.
    gate_up = torch.empty(experts, 2 * inner, width, dtype=dtype)
    down = torch.empty(experts, width, inner, dtype=dtype)
    chosen = torch.zeros(tokens, top_k, dtype=torch.int64)
    moe(torch.empty(tokens, width, dtype=dtype), gate_up, down, torch.empty(tokens, top_k), chosen)


def one_token() -> None:
    _mixture(1, 8, 2, 4096, 14336, torch.bfloat16)


def tokens_of_a_prompt() -> None:
    for tokens in (200, 700, 4000):
        _mixture(tokens, 64, 6, 2048, 1408, torch.bfloat16)


def other_numbers() -> None:
    _mixture(8, 8, 2, 2048, 1000, torch.float16)
    for tokens in (8, 64, 200, 1000):
        _mixture(tokens, 8, 2, 2048, 1000, torch.float32)


def _linear(tokens: int, experts: int, top_k: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    weight, chosen = torch.empty(experts, outputs, inputs, dtype=dtype), torch.zeros(tokens, top_k, dtype=torch.int64)
    experts_linear(torch.empty(tokens, inputs, dtype=dtype), weight, chosen)
    experts_linear(torch.empty(tokens, top_k, inputs, dtype=dtype), weight, chosen)


def products_one_by_one() -> None:
    for tokens in (1, 200, 4000):
        _linear(tokens, 64, 6, 2048, 2816, torch.bfloat16)
    _linear(8, 8, 2, 2048, 1000, torch.float32)
