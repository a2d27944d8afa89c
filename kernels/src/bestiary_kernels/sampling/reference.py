"""Choosing tokens in torch: the meaning of `greedy` and `draw`. Sorts only as much of a row as its limits ask for."""

import torch
from torch import Tensor

__all__ = ["draw", "greedy"]

#: Sorting a whole vocabulary costs milliseconds; the nucleus nearly always lies within this many tokens.
_FIRST_LOOK = 1024


def greedy(logits: Tensor) -> Tensor:
    """Return int64 [R]; see `bestiary_kernels.greedy`."""
    best, tokens = logits.max(-1)
    return torch.where(best.isfinite(), tokens, -1)  # the largest of a row is NaN where any is


def draw(
    logits: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor, uniforms: Tensor
) -> Tensor:
    """Return int64 [R]; see `bestiary_kernels.draw`."""
    scores = logits / temperatures[:, None]
    best = scores.amax(-1)
    floor = torch.where(min_ps > 0, best + min_ps.log(), -torch.inf)
    cut = ((top_ks > 0) | (top_ps < 1)).nonzero()[:, 0]
    if len(cut):
        kept = scores[cut].masked_fill(scores[cut] < floor[cut, None], -torch.inf)
        floor[cut] = torch.maximum(floor[cut], _nucleus_floor(kept, top_ks[cut].long(), top_ps[cut].double()))
    scores = scores.masked_fill(scores < floor[:, None], -torch.inf)
    sums = _sums(scores - best[:, None])
    target = uniforms * sums[:, -1]
    tokens = torch.searchsorted(sums, target[:, None], right=True)[:, 0]
    return tokens.clamp_(max=logits.shape[1] - 1)


def _nucleus_floor(scores: Tensor, top_ks: Tensor, top_ps: Tensor) -> Tensor:
    """The smallest score of each row that top-k and top-p keep."""
    vocabulary = scores.shape[1]
    limits = torch.where(top_ks > 0, top_ks, vocabulary).clamp_(max=vocabulary)
    width = min(vocabulary, max(_FIRST_LOOK, int(top_ks.max())))
    floor, sure = _floor_within(scores, width, limits, top_ps)
    if not sure.all():
        again = (~sure).nonzero()[:, 0]
        floor[again] = _floor_within(scores[again], vocabulary, limits[again], top_ps[again])[0]
    return floor


def _floor_within(scores: Tensor, width: int, limits: Tensor, top_ps: Tensor) -> tuple[Tensor, Tensor]:
    """The floor as the `width` largest scores show it, and for each row whether they were enough to tell.

    Weights are added up one after the other, so that a row's sums are the same whatever stands beside it.
    """
    top = scores.topk(width, dim=-1).values
    best = top[:, :1]
    weight = (top - best).exp().double()
    mass = weight.cumsum(-1)
    total = mass.gather(1, (limits[:, None] - 1).clamp(max=width - 1))
    everything = limits >= scores.shape[1]
    if width < scores.shape[1] and everything.any():
        total[everything] = _sums(scores[everything] - best[everything])[:, -1:]
    # A token is kept while what stands before it falls short of p: the one that crosses p is the last.
    short = mass - weight < top_ps[:, None] * total
    num_kept = (short & (torch.arange(width, device=scores.device) < limits[:, None])).sum(-1)
    floor = top.gather(1, (num_kept - 1).clamp(min=0)[:, None])[:, 0]
    return floor, (num_kept < width) | (limits <= width)


def _sums(scores: Tensor) -> Tensor:
    """Running sums of the weights, in vocabulary order."""
    return scores.exp().cumsum(-1, dtype=torch.float64)
