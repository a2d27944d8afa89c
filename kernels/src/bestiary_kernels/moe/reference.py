"""Mixture of experts in torch: the meaning of `route` and `moe`. Shazeer et al., 2017 (arXiv 1701.06538)."""

import torch
from torch import Tensor
from torch.nn import functional

from bestiary_kernels.activation.reference import gated_activation

__all__ = ["moe", "route"]


def route(
    logits: Tensor, top_k: int, renormalise: bool, scale: float, groups: int, top_groups: int, softmax_last: bool
) -> tuple[Tensor, Tensor]:
    """Return (weights float32 [T, k], experts int64 [T, k]); see `bestiary_kernels.route`."""
    scores = logits.float() if softmax_last else logits.float().softmax(-1)
    if top_groups < groups:
        grouped = scores.view(len(scores), groups, -1)
        best = grouped.amax(-1).topk(top_groups, sorted=False).indices
        closed = torch.ones(len(scores), groups, dtype=torch.bool, device=scores.device).scatter_(1, best, False)
        scores = grouped.masked_fill(closed[:, :, None], float("-inf")).flatten(1)
    weights, experts = scores.topk(top_k)
    if softmax_last:
        weights = weights.softmax(-1)
    elif renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * scale, experts


def moe(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, act: str) -> Tensor:
    """Return [T, D]: expert after expert over the tokens that chose it, added up in float32 and rounded once.

    In float32 this equals the eager experts of transformers' Mixtral; in bfloat16 theirs round after each expert.
    """
    chosen = sorted(set(experts.flatten().tolist()))
    if chosen and (chosen[0] < 0 or chosen[-1] >= len(gate_up)):
        raise IndexError(f"moe: an expert's number lies outside the {len(gate_up)} experts")
    y = x.new_zeros(x.shape, dtype=torch.float32)
    for expert in chosen:
        token, place = (experts == expert).nonzero(as_tuple=True)
        hidden = gated_activation(functional.linear(x[token], gate_up[expert]), act)
        said = functional.linear(hidden, down[expert]).float()
        y.index_add_(0, token, said * weights[token, place, None])
    return y.to(x.dtype)
