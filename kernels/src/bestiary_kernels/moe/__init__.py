"""Mixture of experts: who computes a token, and the sum of what they say.

Shapes: T tokens, E experts, k chosen for a token, D width, I inner width.
"""

from functools import partial
from struct import Struct

import torch
from torch import Tensor

from bestiary_kernels import gpu, library
from bestiary_kernels.activation import KINDS
from bestiary_kernels.moe import reference
from bestiary_kernels.moe.linear import are_few, experts_linear
from bestiary_kernels.moe.mix import mixed
from bestiary_kernels.moe.squeezed import SqueezedExperts

__all__ = ["GROUP_RULES", "SCORINGS", "SqueezedExperts", "experts_linear", "moe", "route"]

#: What `scoring` may be, in the order of router/cpu.cpp.
SCORINGS = ("softmax", "sigmoid", "sparsemixer")
#: What `group_by` may be.
GROUP_RULES = ("best", "best_two")

_LOGITS = len(SCORINGS)  # in place of a scoring: the softmax comes last
_MOST_EXPERTS = 1024  # MOST_EXPERTS in router/cpu.cpp
_ROUTE_CALL = Struct("9q2d")  # RouteCall in router/cpu.cpp


def route(
    logits_TE: Tensor,
    top_k: int,
    *,
    renormalise: bool,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    softmax_last: bool = False,
    scoring: str = "softmax",
    bias_E: Tensor | None = None,
    group_by: str = "best",
    jitter: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return (weights float32 [T, k], experts int64 [T, k]) of the `top_k` best experts of each token, the best first.

    `scoring` says what an expert is worth, in float32: "softmax" is its part of the softmax over all, "sigmoid" stands
    for itself. The best are chosen by score + `bias_E` (DeepSeek-V3, arXiv 2412.19437), of equal ones the first; their
    weights are the scores alone. `renormalise` makes a token's weights sum to 1, and `scale` multiplies them last. With
    `softmax_last` the logits are the scores and the chosen ones' softmax is their weights. With `groups`, equal slices
    of the experts, only those in the `top_groups` best groups may be chosen; a group is as good as its "best" expert
    (DeepSeek-V2, arXiv 2405.04434) or the sum of its "best_two" (V3), as `group_by` says.

    With scoring "sparsemixer" (Phi-3.5-MoE, arXiv 2409.12136) experts are chosen one after the other by their logits;
    each weighs its part of a softmax over those left whose logits are at most 2 `jitter` below its own, relative to the
    larger of its own and theirs without a sign.

    Raises ValueError for numbers and names that do not fit.
    """
    experts = logits_TE.shape[-1]
    if logits_TE.dim() != 2 or not 1 <= top_groups <= groups or experts % groups:
        raise ValueError(
            f"route: {tuple(logits_TE.shape)} logits cannot be {groups} groups of which {top_groups} count"
        )
    if not 1 <= top_k <= experts // groups * top_groups:
        raise ValueError(f"route: top_k is {top_k}, of {experts // groups * top_groups} experts that may be chosen")
    if scoring not in SCORINGS or group_by not in GROUP_RULES:
        raise ValueError(f"route: scoring {scoring!r} or group_by {group_by!r} is unknown")
    if softmax_last and scoring != "softmax":
        raise ValueError(f"route: softmax_last has no meaning for scoring {scoring!r}")
    if scoring == "sparsemixer" and (groups > 1 or bias_E is not None):
        raise ValueError("route: sparsemixer knows no groups and no bias")
    if group_by == "best_two" and groups > 1 and experts // groups < 2:
        raise ValueError("route: a group of one expert has no best two")
    if bias_E is not None and bias_E.shape != (experts,):
        raise ValueError(f"route: the bias has shape {tuple(bias_E.shape)}, not that of {experts} experts")
    numbers = (top_k, renormalise, scale, groups, top_groups, softmax_last, scoring, bias_E, group_by, jitter)
    if (on_gpu := gpu.kernels("moe", logits_TE)) is not None:
        found: tuple[Tensor, Tensor] = on_gpu.route(logits_TE, *numbers)
        return found
    kernels = library.native(logits_TE)
    if kernels is not None and _is_routable(logits_TE, bias_E):
        return _native_route(kernels, logits_TE, *numbers)
    return (_route_operator if library.is_traced(logits_TE) else reference.route)(logits_TE, *numbers)


def _is_routable(logits: Tensor, bias: Tensor | None) -> bool:
    """Whether the C++ function knows the dtypes and layouts."""
    return (
        logits.dtype in library.IS_BF16
        and logits.stride(1) == 1
        and logits.shape[1] <= _MOST_EXPERTS
        and (bias is None or (bias.dtype is torch.float32 and bias.is_contiguous()))
    )


def _native_route(
    kernels: library.Kernels,
    logits: Tensor,
    top_k: int,
    renormalise: bool,
    scale: float,
    groups: int,
    top_groups: int,
    softmax_last: bool,
    scoring: str,
    bias: Tensor | None,
    group_by: str,
    jitter: float,
) -> tuple[Tensor, Tensor]:
    rows, experts = logits.shape
    weights = logits.new_empty((rows, top_k), dtype=torch.float32)
    chosen = logits.new_empty((rows, top_k), dtype=torch.int64)
    number = _LOGITS if softmax_last else SCORINGS.index(scoring)
    shape = (rows, experts, logits.stride(0), top_k, groups, top_groups, number)
    failed = kernels.route(
        library.IS_BF16[logits.dtype],
        logits.data_ptr(),
        None if bias is None else bias.data_ptr(),
        weights.data_ptr(),
        chosen.data_ptr(),
        _ROUTE_CALL.pack(*shape, renormalise, group_by == "best_two", scale, 2 * jitter),
    )
    if failed:
        library.fail("route", failed)
    return weights, chosen


def moe(
    x_TD: Tensor,
    gate_up: Tensor | SqueezedExperts,
    down: Tensor | SqueezedExperts,
    weights_Tk: Tensor,
    experts_Tk: Tensor,
    act: str = "silu",
) -> Tensor:
    """Return [T, D]: for each token the sum over its chosen experts of weight x down(act(gate) * up).

    gate_up is [E, 2I, D], gate's rows first, down [E, D, I], both in x's dtype, and both squeezed or neither; weights
    and experts [T, k] are what `route` returns, and `act` is a kind of `gated_activation`. Products and activation are
    rounded to x's dtype, the sum is float32 and rounded once. Raises ValueError for shapes, dtypes or an act that do
    not fit, IndexError for an expert outside the weights; on a GPU such an expert says nothing.
    """
    experts, inner_twice, width = gate_up.shape
    tokens, top_k = x_TD.shape[0], experts_Tk.shape[-1]
    if (
        x_TD.shape[1:] != (width,)
        or inner_twice % 2
        or down.shape != (experts, width, inner_twice // 2)
        or not x_TD.dtype is gate_up.dtype is down.dtype
        or experts_Tk.shape != (tokens, top_k)
        or weights_Tk.shape != (tokens, top_k)
    ):
        raise ValueError("moe: the shapes or dtypes of x, gate_up, down, weights and experts do not fit")
    if act not in KINDS:
        raise ValueError(f"moe: act {act!r} is unknown; choose one of {', '.join(KINDS)}")
    if isinstance(gate_up, SqueezedExperts) or isinstance(down, SqueezedExperts):
        if not (isinstance(gate_up, SqueezedExperts) and isinstance(down, SqueezedExperts)):
            raise ValueError("moe: of gate_up and down one is squeezed and the other is not")
        return gate_up.mixture(x_TD, down, weights_Tk, experts_Tk, act)
    if (on_gpu := gpu.kernels("moe", x_TD)) is not None:
        made: Tensor = on_gpu.moe(x_TD, gate_up, down, weights_Tk, experts_Tk, act)
        return made
    kernels, is_bf16 = library.native(x_TD), library.IS_BF16.get(x_TD.dtype)
    if (
        kernels is None
        or is_bf16 is None
        or not _is_known(x_TD, gate_up, down, weights_Tk, experts_Tk)
        or not are_few(kernels, tokens * top_k, experts)
    ):
        function = _operator if library.is_traced(x_TD) else reference.moe
        return function(x_TD, gate_up, down, weights_Tk, experts_Tk, act)
    matrices = gate_up.data_ptr(), down.data_ptr()
    mix = partial(kernels.moe, is_bf16)
    return mixed(mix, act, x_TD, *matrices, weights_Tk, experts_Tk, experts, inner_twice // 2)


def _is_known(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> bool:
    """Whether the C++ function knows the layouts: rows of x may be strided, all else is dense."""
    return (
        weights.dtype is torch.float32
        and experts.dtype is torch.int64
        and x.stride(1) == 1
        and gate_up.is_contiguous()
        and down.is_contiguous()
        and weights.is_contiguous()
        and experts.is_contiguous()
    )


_route_operator = torch.library.custom_op("bestiary::route", mutates_args=())(reference.route)


@_route_operator.register_fake
def _route_shapes(logits: Tensor, top_k: int, *_: object) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


_operator = torch.library.custom_op("bestiary::moe", mutates_args=())(reference.moe)


@_operator.register_fake
def _shape(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)
