"""Logits to tokens for a whole step at once. Knows rows and parameters, not requests, engine or text.

Order of work, as vLLM's: log-probabilities of the raw logits; bias and forbidden tokens; penalties; temperature; min-p;
top-k; top-p; draw. A row's token depends on that row alone, so that a seed gives the same text in any company: each row
draws one uniform number from its own seed and position, and inverts its cumulative distribution in vocabulary order.

Shapes: R rows, V vocabulary.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from struct import pack

import torch
from torch import Tensor

from bestiary.sampling.params import SamplingParams

__all__ = ["Choice", "Row", "TopLogprobs", "sample", "top_logprobs", "uniform"]


@dataclass(slots=True)
class Row:
    """What the sampler knows of one row of logits."""

    params: SamplingParams
    #: Prompt and answer so far; only read where a penalty asks for it.
    tokens: Sequence[int]
    num_prompt: int
    seed: int
    #: Tokens that end the answer; forbidden while it is shorter than `min_tokens`.
    end_ids: Sequence[int] = ()

    @property
    def num_output(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.num_prompt


@dataclass(slots=True)
class TopLogprobs:
    """Log-probabilities at one position: the chosen token's first, then the most likely ones in falling order."""

    token_ids: list[int]
    logprobs: list[float]
    #: The chosen token's place among all tokens, from 1.
    rank: int


@dataclass(slots=True)
class Choice:
    """The sampler's answer for one row. `token` is None where the logits were not numbers."""

    token: int | None
    logprobs: TopLogprobs | None = None


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on seed and position alone."""
    digest = blake2b(pack("<qq", seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53  # 53 bits: what a float holds without rounding up to 1


def sample(logits_RV: Tensor, rows: Sequence[Row]) -> list[Choice]:
    """One token for each row of float32 logits (which are changed in place)."""
    wanted = [r for r, row in enumerate(rows) if row.params.logprobs is not None]
    raw = logits_RV[wanted] if wanted else None
    _forbid_and_bias(logits_RV, rows)
    _penalise(logits_RV, rows)
    best_R, tokens_R = logits_RV.max(-1)
    drawing = [r for r, row in enumerate(rows) if not row.params.is_greedy]
    if drawing:
        tokens_R[drawing] = _draw(logits_RV[drawing], [rows[r] for r in drawing])
    sound = torch.isfinite(best_R).tolist()  # the largest of a row is NaN where any is
    choices = [Choice(token if ok else None) for token, ok in zip(tokens_R.tolist(), sound, strict=True)]
    if raw is not None:
        counts = [rows[r].params.logprobs or 0 for r in wanted]
        for r, top in zip(wanted, top_logprobs(raw, tokens_R[wanted], counts), strict=True):
            choices[r].logprobs = top
    return choices


def top_logprobs(logits_RV: Tensor, chosen_R: Tensor, counts: Sequence[int]) -> list[TopLogprobs]:
    """Log-probabilities of the chosen tokens and of the `counts[r]` most likely ones of each row."""
    logprobs_RV = logits_RV.float().log_softmax(-1)
    chosen = logprobs_RV.gather(1, chosen_R[:, None])
    ranks = (logprobs_RV > chosen).sum(-1) + 1
    values, ids = logprobs_RV.topk(min(max(counts), logits_RV.shape[1]), dim=-1)
    every = zip(
        counts, chosen_R.tolist(), chosen[:, 0].tolist(), ranks.tolist(), ids.tolist(), values.tolist(), strict=True
    )
    return [TopLogprobs([t, *i[:n]], [lp, *v[:n]], rank) for n, t, lp, rank, i, v in every]


def _forbid_and_bias(logits_RV: Tensor, rows: Sequence[Row]) -> None:
    for r, row in enumerate(rows):
        if row.params.logit_bias:
            ids = torch.tensor(list(row.params.logit_bias), device=logits_RV.device)
            logits_RV[r, ids] += torch.tensor(list(row.params.logit_bias.values()), device=logits_RV.device)
        if row.end_ids and row.num_output < row.params.min_tokens:
            logits_RV[r, list(row.end_ids)] = -torch.inf


def _penalise(logits_RV: Tensor, rows: Sequence[Row]) -> None:
    """Repetition over prompt and answer (Keskar et al. 2019, CTRL); presence and frequency over the answer (OpenAI)."""
    for r, row in enumerate(rows):
        params = row.params
        if params.repetition_penalty != 1:
            seen = torch.tensor(list(set(row.tokens)), device=logits_RV.device)
            score = logits_RV[r, seen]
            factor = params.repetition_penalty
            logits_RV[r, seen] = torch.where(score > 0, score / factor, score * factor)
        if (params.presence_penalty or params.frequency_penalty) and row.num_output:
            counts = Counter(row.tokens[row.num_prompt :])
            seen = torch.tensor(list(counts), device=logits_RV.device)
            times = torch.tensor(list(counts.values()), device=logits_RV.device)
            logits_RV[r, seen] -= params.frequency_penalty * times + params.presence_penalty


def _draw(logits_RV: Tensor, rows: Sequence[Row]) -> Tensor:
    """A token for each row, drawn from what temperature, min-p, top-k and top-p leave."""
    device = logits_RV.device
    logits_RV = logits_RV / torch.tensor([row.params.temperature for row in rows], device=device)[:, None]
    floor_R = logits_RV.new_full((len(rows),), -torch.inf)
    best_R = logits_RV.amax(-1)
    for r, row in enumerate(rows):
        if row.params.min_p > 0:
            floor_R[r] = best_R[r] + torch.tensor(row.params.min_p).log().item()
    cut = [r for r, row in enumerate(rows) if row.params.top_k > 0 or row.params.top_p < 1]
    if cut:
        kept = logits_RV[cut].masked_fill(logits_RV[cut] < floor_R[cut, None], -torch.inf)
        floor_R[cut] = torch.maximum(floor_R[cut], _nucleus_floor(kept, [rows[r] for r in cut]))
    logits_RV = logits_RV.masked_fill(logits_RV < floor_R[:, None], -torch.inf)
    cumulative_RV = _sums(logits_RV - best_R[:, None])
    at = torch.tensor([uniform(row.seed, row.num_output) for row in rows], dtype=torch.float64, device=device)
    target = at * cumulative_RV[:, -1]
    tokens_R = torch.searchsorted(cumulative_RV, target[:, None], right=True)[:, 0]
    return tokens_R.clamp_(max=logits_RV.shape[1] - 1)


#: Sorting a whole vocabulary costs milliseconds; the nucleus nearly always lies within this many tokens.
_FIRST_LOOK = 1024


def _nucleus_floor(logits_RV: Tensor, rows: Sequence[Row]) -> Tensor:
    """The smallest logit of each row that top-k and top-p keep. Tokens tied with it stay: equals have no order."""
    vocabulary, device = logits_RV.shape[1], logits_RV.device
    k_R = torch.tensor([row.params.top_k if row.params.top_k > 0 else vocabulary for row in rows], device=device)
    p_R = torch.tensor([row.params.top_p for row in rows], dtype=torch.float64, device=device)
    k_R.clamp_(max=vocabulary)
    width = min(vocabulary, max(_FIRST_LOOK, *(row.params.top_k for row in rows)))
    floor_R, sure_R = _floor_within(logits_RV, width, k_R, p_R)
    if not sure_R.all():
        again = (~sure_R).nonzero()[:, 0]
        floor_R[again] = _floor_within(logits_RV[again], vocabulary, k_R[again], p_R[again])[0]
    return floor_R


def _floor_within(logits_RV: Tensor, width: int, k_R: Tensor, p_R: Tensor) -> tuple[Tensor, Tensor]:
    """The floor as the `width` largest logits show it, and for each row whether they were enough to tell.

    Weights are added up one after the other, so that a row's sums are the same whatever stands beside it.
    """
    top_RW = logits_RV.topk(width, dim=-1).values
    best_R1 = top_RW[:, :1]
    weight_RW = (top_RW - best_R1).exp().double()
    mass_RW = weight_RW.cumsum(-1)
    total_R1 = mass_RW.gather(1, (k_R[:, None] - 1).clamp(max=width - 1))
    everything = k_R >= logits_RV.shape[1]
    if width < logits_RV.shape[1] and everything.any():
        total_R1[everything] = _sums(logits_RV[everything] - best_R1[everything])[:, -1:]
    # A token is kept while what stands before it falls short of p: the one that crosses p is the last.
    short_RW = mass_RW - weight_RW < p_R[:, None] * total_R1
    num_kept = (short_RW & (torch.arange(width, device=logits_RV.device) < k_R[:, None])).sum(-1)
    floor_R = top_RW.gather(1, (num_kept - 1).clamp(min=0)[:, None])[:, 0]
    return floor_R, (num_kept < width) | (k_R <= width)


def _sums(logits_RV: Tensor) -> Tensor:
    """Running sums of the weights, in vocabulary order."""
    return logits_RV.exp().cumsum(-1, dtype=torch.float64)
