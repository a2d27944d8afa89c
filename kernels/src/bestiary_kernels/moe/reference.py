"""Mixture of experts in torch: the meaning of `route` and `moe`. Shazeer et al., 2017 (arXiv 1701.06538)."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from bestiary_kernels import library
from bestiary_kernels.activation.reference import gated_activation

__all__ = ["TINY", "by_expert", "experts_linear", "moe", "route"]

#: Added to a sum of weights before they are divided by it: sigmoids may all be 0.
TINY = 1e-20


def route(
    logits: Tensor,
    top_k: int,
    renormalise: bool,
    scale: float,
    groups: int,
    top_groups: int,
    softmax_last: bool,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    group_by: str = "best",
    jitter: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return (weights float32 [T, k], experts int64 [T, k]); see `bestiary_kernels.route`."""
    wide = logits.float()
    if scoring == "sparsemixer":
        weights, experts = _sparsemixer(wide, top_k, jitter)
    else:
        scores = wide if softmax_last else wide.sigmoid() if scoring == "sigmoid" else wide.softmax(-1)
        keys = scores if bias is None else scores + bias.float()
        if top_groups < groups:
            keys = _of_best_groups(keys.view(len(keys), groups, keys.shape[1] // groups), top_groups, group_by)
        experts = _best(keys, top_k)
        weights = scores.gather(1, experts)
        if softmax_last:
            weights = weights.softmax(-1)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + TINY)
    return weights * scale, experts


def _best(keys: Tensor, count: int) -> Tensor:
    """The places of the largest keys of each row, the first of equal ones first."""
    return keys.argsort(dim=-1, descending=True, stable=True)[:, :count].contiguous()


def _of_best_groups(keys: Tensor, count: int, group_by: str) -> Tensor:
    """[T, E] the keys [T, groups, E / groups], but -inf outside the `count` best groups."""
    best = keys.amax(-1) if group_by == "best" else keys.topk(2).values.sum(-1)
    closed = torch.ones_like(best, dtype=torch.bool).scatter_(1, _best(best, count), False)
    return keys.masked_fill(closed[:, :, None], float("-inf")).flatten(1)


def _sparsemixer(scores: Tensor, top_k: int, jitter: float) -> tuple[Tensor, Tensor]:
    """Weights and experts after Liu et al., 2024 (arXiv 2409.12136), as a model computes that no longer learns.

    Expert after expert: the best that is left, weighed by a softmax over those left that come near it.
    """
    left, weights, experts = scores, [], []
    for _ in range(top_k):
        expert = _best(left, 1)
        best = left.gather(1, expert)
        is_far = (best - scores) / torch.maximum(scores.abs(), best) > 2 * jitter
        weights.append(left.masked_fill(is_far, float("-inf")).softmax(-1).gather(1, expert))
        experts.append(expert)
        left = left.scatter(1, expert, float("-inf"))
    return torch.cat(weights, 1), torch.cat(experts, 1)


def moe(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, act: str) -> Tensor:
    """Return [T, D]: expert after expert over the tokens that chose it, added up in float32 and rounded once.

    In float32 this equals the eager experts of transformers' Mixtral; in bfloat16 theirs round after each expert.
    Raises IndexError for an expert outside the weights.
    """
    y = x.new_zeros(x.shape, dtype=torch.float32)
    for expert, places in by_expert(experts, len(gate_up)):
        token = places // experts.shape[1]
        hidden = gated_activation(functional.linear(x[token], gate_up[expert]), act)
        said = functional.linear(hidden, down[expert]).float()
        y.index_add_(0, token, said * weights.flatten()[places, None])
    return y.to(x.dtype)


def experts_linear(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """Return [T, k, N], expert after expert. Raises IndexError for an expert outside the weights."""
    y = x.new_empty(*experts.shape, weight.shape[1])
    choices = y.flatten(0, 1)
    for expert, places in by_expert(experts, len(weight)):
        rows = x[places // experts.shape[1]] if x.dim() == 2 else x.flatten(0, 1)[places]
        choices[places] = functional.linear(rows, weight[expert])
    return y


def by_expert(experts: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert that somebody chose, and the numbers of the choices of it, in their order."""
    chosen = experts.flatten()
    if chosen.numel() and (int(chosen.min()) < 0 or int(chosen.max()) >= count):
        library.fail("moe", library.BAD_EXPERT)
    sizes = chosen.bincount(minlength=count).tolist()
    for expert, places in enumerate(torch.split(chosen.argsort(stable=True), sizes)):
        if len(places):
            yield expert, places
