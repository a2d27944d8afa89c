"""`moe` by torch's products, one expert after the other over tokens that are sorted once: for many tokens on a CPU."""

import torch
from torch import Tensor

from bestiary_kernels import library
from bestiary_kernels.activation import gated_activation

__all__ = ["moe"]


def moe(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, act: str) -> Tensor:
    """As the reference. Products of any number of tokens are worth a call each; what is between them at once."""
    tokens, top_k = experts.shape
    chosen = experts.flatten()
    if chosen.numel() and (int(chosen.min()) < 0 or int(chosen.max()) >= len(gate_up)):
        library.fail("moe", library.BAD_EXPERT)
    order = chosen.argsort(stable=True)
    parts = [(expert, count) for expert, count in enumerate(chosen.bincount().tolist()) if count]
    sizes = [count for _, count in parts]
    sorted_x = x[order // top_k]
    inner = sorted_x.new_empty(len(order), gate_up.shape[1])
    for (expert, _), some, to in zip(parts, torch.split(sorted_x, sizes), torch.split(inner, sizes), strict=True):
        torch.mm(some, gate_up[expert].T, out=to)
    hidden = gated_activation(inner, act)
    said = torch.empty_like(sorted_x)
    for (expert, _), some, to in zip(parts, torch.split(hidden, sizes), torch.split(said, sizes), strict=True):
        torch.mm(some, down[expert].T, out=to)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    of_tokens = said[back].view(tokens, top_k, -1).float()
    return torch.einsum("tkd,tk->td", of_tokens, weights).to(x.dtype)
