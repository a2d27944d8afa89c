"""Routers and mixtures of experts."""

from collections.abc import Callable

import torch
from torch import Tensor

from bestiary_kernels import experts_linear, moe, route

from .draw import DTYPES, Draw, case, close, normal, within

_ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}


def check_choice(keys: Tensor, experts: Tensor) -> None:
    """Each row's experts are different ones, and their keys as large as the largest: near ties may go either way."""
    assert experts.dtype is torch.int64
    assert all(len(set(row)) == len(row) for row in experts.tolist())
    best = keys.topk(experts.shape[1]).values
    assert torch.allclose(keys.gather(1, experts), best, rtol=1e-5, atol=1e-6)


@case
def route_best(draw: Draw, device: torch.device) -> None:
    """The best of all, of softmax or sigmoid, with or without a bias; logits in a wider buffer."""
    dtype, tokens, experts = draw.choice(DTYPES), draw.integer(0, 6), draw.choice((1, 8, 64, draw.integer(2, 70)))
    top_k = draw.integer(1, min(experts, 8))
    way = draw.choice(("softmax", "softmax_last", "sigmoid"))
    logits = within(draw, tokens, experts, more=(0, 3), dtype=dtype, device=device).mul_(3)
    renormalise, scale = draw.choice((True, False)), draw.choice((1.0, 2.5))
    bias = normal(draw, experts, dtype=torch.float32, device=device) if draw.choice((True, False)) else None
    weights, chosen = route(
        logits,
        top_k,
        renormalise=renormalise,
        scale=scale,
        softmax_last=way == "softmax_last",
        scoring="sigmoid" if way == "sigmoid" else "softmax",
        bias_E=bias,
    )
    wide = logits.double()
    scores = {"softmax": wide.softmax(-1), "softmax_last": wide, "sigmoid": wide.sigmoid()}[way]
    check_choice(scores if bias is None else scores + bias.double(), chosen)
    close(weights, weights_of(scores.gather(1, chosen), way == "softmax_last", renormalise, scale))


def weights_of(scores: Tensor, softmax_last: bool, renormalise: bool, scale: float) -> Tensor:
    if softmax_last:
        scores = scores.softmax(-1)
    return scale * (scores / scores.sum(-1, keepdim=True) if renormalise else scores)


@case
def route_groups(draw: Draw, device: torch.device) -> None:
    """The best of the best groups, whose sizes need be no power of two."""
    dtype, tokens = draw.choice(DTYPES), draw.integer(0, 6)
    groups, size = draw.integer(2, 9), draw.choice((2, 8, 20))
    top_groups, scoring = draw.integer(1, groups), draw.choice(("softmax", "sigmoid"))
    top_k, group_by = draw.integer(1, min(size * top_groups, 8)), draw.choice(("best", "best_two"))
    logits = normal(draw, tokens, groups * size, dtype=dtype, device=device)
    bias = normal(draw, groups * size, dtype=torch.float32, device=device)
    weights, chosen = route(
        logits,
        top_k,
        renormalise=False,
        groups=groups,
        top_groups=top_groups,
        scoring=scoring,
        bias_E=bias,
        group_by=group_by,
    )
    scores = logits.double().sigmoid() if scoring == "sigmoid" else logits.double().softmax(-1)
    keys = (scores + bias.double()).view(tokens, groups, size)
    values = keys.topk(1 if group_by == "best" else 2).values.sum(-1)
    worst = values.topk(top_groups).values[:, -1:] if tokens else values[:, :1]
    check_choice(keys.masked_fill((values < worst - 1e-9)[:, :, None], -torch.inf).flatten(1), chosen)
    close(weights, scores.gather(1, chosen))


@case
def route_sparsemixer(draw: Draw, device: torch.device) -> None:
    """Expert after expert, each weighed among those near it."""
    dtype, tokens, experts = draw.choice(DTYPES), draw.integer(0, 6), draw.choice((2, 16, draw.integer(2, 40)))
    top_k, jitter = draw.integer(1, min(3, experts)), draw.choice((0.01, 0.1, 0.5))
    logits = normal(draw, tokens, experts, dtype=dtype, device=device) + draw.choice((0.0, 2.0, -5.0))
    weights, chosen = route(logits, top_k, renormalise=False, scoring="sparsemixer", jitter=jitter)
    wanted = torch.zeros(tokens, top_k, dtype=torch.float64)
    for row, of_row in enumerate(logits.double().tolist()):
        left = dict(enumerate(of_row))
        for choice, expert in enumerate(chosen[row].tolist()):
            best = left[expert]
            assert best == max(left.values())
            near = [x for x in left.values() if not best - x > 2 * jitter * max(abs(x), best)]
            wanted[row, choice] = 1 / torch.tensor([x - best for x in near], dtype=torch.float64).exp().sum()
            del left[expert]
    close(weights, wanted)


@case
def mixture(draw: Draw, device: torch.device) -> None:
    """Tokens of a wider buffer, experts chosen by many, by few or by nobody, whose weights are NaN."""
    dtype, tokens, experts = draw.choice(DTYPES), draw.choice((0, 1, 7, 40)), draw.choice((1, 5, 8))
    width, inner = draw.choice((1, 33, 64, 130)), draw.choice((1, 16, 49))
    top_k, act = draw.integer(1, min(3, experts)), draw.choice(sorted(_ACTS))
    x = within(draw, tokens, width, more=(0, 7), dtype=dtype, device=device)
    gate_up = normal(draw, experts, 2 * inner, width, dtype=dtype, device=device) * width**-0.5
    down = normal(draw, experts, width, inner, dtype=dtype, device=device) * inner**-0.5
    liked = draw.integer(top_k, experts)
    chosen = normal(draw, tokens, liked, dtype=torch.float32, device=device).topk(top_k).indices
    weights = normal(draw, tokens, top_k, dtype=torch.float32, device=device).sigmoid()
    for expert in range(experts):
        if expert not in chosen:
            gate_up[expert], down[expert] = torch.nan, torch.nan
    y = moe(x, gate_up, down, weights, chosen, act)
    wanted = torch.zeros(tokens, width, dtype=torch.float64, device=device)
    size = torch.zeros_like(wanted)
    for row in range(tokens):
        for weight, expert in zip(weights[row].double(), chosen[row].tolist(), strict=True):
            gate, up = (gate_up[expert].double() @ x[row].double()).chunk(2)
            hidden = _ACTS[act](gate) * up
            wanted[row] += weight * (down[expert].double() @ hidden)
            # Rounded five times on the way, the gate before an activation that may be steep; sums may cancel.
            gates, ups = (gate_up[expert].double().abs() @ x[row].double().abs()).chunk(2)
            off = 1.5 * (gate * up).abs() + 0.1 * (gates * up.abs() + gate.abs() * ups)
            size[row] += weight * (down[expert].double().abs() @ off)
    close(y, wanted, size)


@case
def linear(draw: Draw, device: torch.device) -> None:
    """A row for all choices of a token, of a wider buffer, or one for each; some experts are chosen by nobody."""
    dtype, tokens, experts = draw.choice(DTYPES), draw.choice((0, 1, 7, 40)), draw.choice((1, 5, 8))
    inputs, outputs = draw.choice((1, 33, 64, 130)), draw.choice((1, 16, 49))
    top_k, each = draw.integer(1, min(3, experts)), draw.choice((True, False))
    weight = normal(draw, experts, outputs, inputs, dtype=dtype, device=device) * inputs**-0.5
    liked = draw.integer(top_k, experts)
    chosen = normal(draw, tokens, liked, dtype=torch.float32, device=device).topk(top_k).indices
    for expert in range(experts):
        if expert not in chosen:
            weight[expert] = torch.nan
    if each:
        x = normal(draw, tokens, top_k, inputs, dtype=dtype, device=device)
        rows = x.double()
    else:
        x = within(draw, tokens, inputs, more=(0, 7), dtype=dtype, device=device)
        rows = x.double()[:, None].expand(-1, top_k, -1)
    y = experts_linear(x, weight, chosen)
    wanted = torch.einsum("tkoi,tki->tko", weight[chosen].double(), rows)
    close(y, wanted, torch.einsum("tkoi,tki->tko", weight[chosen].double().abs(), rows.abs()))
