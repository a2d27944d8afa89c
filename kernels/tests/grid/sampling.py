"""Choosing tokens: the best is the best; one that is drawn may come, and is where the draw says."""

import math

import torch
from torch import Tensor

from bestiary_kernels import draw, greedy

from .draw import DTYPES, Draw, case, normal

#: How far a sum of float32 weights may be off, as a share of the whole.
_NOISE = 1e-5


@case
def best(draw_: Draw, device: torch.device) -> None:
    """Rows within a wider table, with ties, both zeros, and here and there what is no number."""
    rows, vocabulary = draw_.integer(0, 4), draw_.choice((1, 2, 50, draw_.integer(1, 700), draw_.integer(8000, 30000)))
    dtype = draw_.choice(DTYPES)
    wide = normal(draw_, rows, vocabulary + draw_.integer(0, 3), dtype=dtype, device=device)
    if draw_.choice((True, False)):
        wide = wide.round()
    if draw_.choice((True, False)):
        wide = wide.clamp(max=0)
    logits = wide[:, :vocabulary]
    if rows:
        strange = draw_.choice((None, 0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf))
        if strange is not None:
            place, places = draw_.integer(0, vocabulary - 1), draw_.choice((1, vocabulary))
            logits[draw_.integer(0, rows - 1), place : place + places : draw_.integer(1, 9)] = strange
    wanted = []
    for row in logits.tolist():
        top = max(row)
        is_number = math.isfinite(top) and not any(math.isnan(one) for one in row)
        wanted.append(row.index(top) if is_number else -1)
    assert greedy(logits).tolist() == wanted


@case
def drawing(draw_: Draw, device: torch.device) -> None:
    """Rows with limits of their own, ties among the scores, and draws at both ends."""
    rows, vocabulary = draw_.integer(0, 4), draw_.choice((1, 2, 50, draw_.integer(1, 700), draw_.integer(4000, 9000)))
    logits = normal(draw_, rows, vocabulary, dtype=torch.float32, device=device) * draw_.choice((0.1, 3.0, 40.0))
    if vocabulary > 1000 or draw_.choice((True, False)):  # of so many some would be as near as rounding errors
        logits = logits.round()
    pick = {
        "temperature": [draw_.choice((0.2, 1.0, 1.7)) for _ in range(rows)],
        "top_k": [draw_.choice((0, 1, 3, 40, 10**6)) for _ in range(rows)],
        "top_p": [draw_.choice((1.0, 1e-4, 0.5, 0.95)) for _ in range(rows)],
        "min_p": [draw_.choice((0.0, 0.05, 1.0)) for _ in range(rows)],
        "uniform": [draw_.choice((0.0, 0.37, 0.9, 1 - 2**-53)) for _ in range(rows)],
    }
    kinds = (torch.float32, torch.int32, torch.float32, torch.float32, torch.float64)
    parameters = [torch.tensor(v, dtype=k, device=device) for v, k in zip(pick.values(), kinds, strict=True)]
    tokens = draw(logits, *parameters)
    for r in range(rows):
        _check(logits[r].double().cpu(), int(tokens[r]), *(values[r] for values in pick.values()))


def _check(logits: Tensor, token: int, temperature: float, top_k: int, top_p: float, min_p: float, at: float) -> None:
    """In float64, by sorting all of it; a token at a limit may stay or go as far as rounding decides."""
    scores = logits / temperature
    weights = (scores - scores.max()).exp()
    order = weights.argsort(descending=True, stable=True).tolist()
    most, fewest = (_kept(weights.tolist(), order, top_k, top_p, min_p, noise) for noise in (_NOISE, -_NOISE))
    assert token in most, f"token {token} may not come: {len(most)} of {len(weights)} may"
    # Its part of the distribution holds the draw.
    for among in (most, fewest):
        total, own = sum(among.values()), among.get(token, 0.0)
        low = sum(weight for i, weight in among.items() if i < token)
        if low - _NOISE * total <= at * total <= low + own + _NOISE * total:
            return
    raise AssertionError(f"token {token} is not where {at} falls")


def _kept(
    weights: list[float], order: list[int], top_k: int, top_p: float, min_p: float, noise: float
) -> dict[int, float]:
    """The weights of all that may come if rounding errors, of this size, let in those at a limit, or keep them out."""
    allowed = [i for i in order if weights[i] >= min_p * (1 - noise) or weights[i] == 1]
    if 0 < top_k < len(allowed):
        allowed = [i for i in allowed if weights[i] >= weights[allowed[top_k - 1]] * (1 - max(noise, 0))]
    counted = sum(weights[i] for i in allowed[: top_k or None])
    kept: dict[int, float] = {}
    mass = last = 0.0
    for i in allowed:
        if kept and mass >= top_p * counted * (1 + noise) and weights[i] < last * (1 - max(noise, 0)):
            break
        kept[i] = last = weights[i]
        mass += last
    return kept
