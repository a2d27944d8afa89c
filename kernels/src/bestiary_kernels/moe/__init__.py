"""Mixture of experts: who computes a token, and the sum of what they say.

Shapes: T tokens, E experts, k chosen for a token, D width, I inner width.
"""

import torch
from torch import Tensor

from bestiary_kernels import library
from bestiary_kernels.activation import KINDS
from bestiary_kernels.moe import reference

__all__ = ["moe", "route"]


def route(
    logits_TE: Tensor,
    top_k: int,
    *,
    renormalise: bool,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    softmax_last: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (weights float32 [T, k], experts int64 [T, k]) of the `top_k` best experts of each token, the best first.

    A weight is the expert's part of the softmax over all, in float32; `renormalise` makes a token's weights sum to 1,
    and `scale` multiplies them last. With `softmax_last` the softmax is over the chosen alone. With `groups`, equal
    slices of the experts, only those in the `top_groups` groups with the best single experts may be chosen
    (DeepSeek-V2, arXiv 2405.04434). Raises ValueError for numbers that do not fit.
    """
    experts = logits_TE.shape[-1]
    if logits_TE.dim() != 2 or experts % groups or not 1 <= top_groups <= groups:
        raise ValueError(
            f"route: {tuple(logits_TE.shape)} logits cannot be {groups} groups of which {top_groups} count"
        )
    if not 1 <= top_k <= experts // groups * top_groups:
        raise ValueError(f"route: top_k is {top_k}, of {experts // groups * top_groups} experts that may be chosen")
    function = _route_operator if library.is_traced(logits_TE) else reference.route
    return function(logits_TE, top_k, renormalise, scale, groups, top_groups, softmax_last)


def moe(
    x_TD: Tensor, gate_up: Tensor, down: Tensor, weights_Tk: Tensor, experts_Tk: Tensor, act: str = "silu"
) -> Tensor:
    """Return [T, D]: for each token the sum over its chosen experts of weight x down(act(gate) * up).

    gate_up is [E, 2I, D], gate's rows first, down [E, D, I], both in x's dtype; weights and experts [T, k] are what
    `route` returns, and `act` is a kind of `gated_activation`. Products and activation are rounded to x's dtype, the
    sum is float32 and rounded once. Raises ValueError for shapes, dtypes or an act that do not fit, IndexError for an
    expert outside the weights.
    """
    experts, inner_twice, width = gate_up.shape
    if (
        x_TD.shape[1:] != (width,)
        or inner_twice % 2
        or down.shape != (experts, width, inner_twice // 2)
        or not x_TD.dtype is gate_up.dtype is down.dtype
        or experts_Tk.dim() != 2
        or experts_Tk.shape[0] != x_TD.shape[0]
        or experts_Tk.shape != weights_Tk.shape
    ):
        raise ValueError("moe: the shapes or dtypes of x, gate_up, down, weights and experts do not fit")
    if act not in KINDS:
        raise ValueError(f"moe: act {act!r} is unknown; choose one of {', '.join(KINDS)}")
    return (_operator if library.is_traced(x_TD) else reference.moe)(x_TD, gate_up, down, weights_Tk, experts_Tk, act)


@torch.library.custom_op("bestiary::route", mutates_args=())
def _route_operator(
    logits: Tensor, top_k: int, renormalise: bool, scale: float, groups: int, top_groups: int, softmax_last: bool
) -> tuple[Tensor, Tensor]:
    return reference.route(logits, top_k, renormalise, scale, groups, top_groups, softmax_last)


@_route_operator.register_fake
def _route_shapes(
    logits: Tensor, top_k: int, renormalise: bool, scale: float, groups: int, top_groups: int, softmax_last: bool
) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("bestiary::moe", mutates_args=())
def _operator(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, act: str) -> Tensor:
    return reference.moe(x, gate_up, down, weights, experts, act)


@_operator.register_fake
def _shape(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, act: str) -> Tensor:
    return x.new_empty(x.shape)
