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
from typing import Any

import msgspec
import torch
from torch import Tensor

import bestiary_kernels as kernels
from bestiary.sampling.params import SamplingParams

__all__ = ["Choice", "Row", "TopLogprobs", "choose", "sample", "top_logprobs", "uniform"]


class Row(msgspec.Struct, gc=False):
    """What the sampler knows of one row of logits."""

    params: SamplingParams
    #: Prompt and answer so far; only read where a penalty asks for it.
    tokens: Sequence[int]
    num_prompt: int
    seed: int
    #: Tokens that end the answer; forbidden while it is shorter than `min_tokens`.
    end_ids: Sequence[int] = ()
    #: Tokens that were chosen and are not among `tokens` yet.
    on_their_way: int = 0
    #: Nobody looks at the answer before it is whole.
    unread: bool = False

    @property
    def num_output(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.num_prompt + self.on_their_way

    @property
    def left(self) -> int:
        """Tokens that are still wanted at most."""
        return (self.params.max_tokens or 2**62) - self.num_output

    @property
    def is_plain(self) -> bool:
        """Nothing but the logits and a drawn number make its next token, and that token is all that is wanted."""
        params = self.params
        if params.logprobs is not None or params.logit_bias or (self.end_ids and params.min_tokens > self.num_output):
            return False
        return params.repetition_penalty == 1 and not params.presence_penalty and not params.frequency_penalty

    @property
    def is_greedy(self) -> bool:
        """Its next token is the likeliest of the logits, and nothing else is wanted."""
        return self.params.is_greedy and self.is_plain


@dataclass(slots=True)
class TopLogprobs:
    """Log-probabilities at one position: the chosen token's first, then the most likely ones in falling order."""

    token_ids: list[int]
    logprobs: list[float]
    #: The chosen token's place among all tokens, from 1.
    rank: int


class Choice(msgspec.Struct, gc=False):
    """The sampler's answer for one row. `token` is None where the logits were not numbers."""

    token: int | None
    logprobs: TopLogprobs | None = None

    @classmethod
    def of(cls, token: int) -> "Choice":
        """What `choose` says."""
        return cls(None if token < 0 else token)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on seed and position alone."""
    digest = blake2b(pack("<qq", seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53  # 53 bits: what a float holds without rounding up to 1


@torch.inference_mode()
def sample(logits_RV: Tensor, rows: Sequence[Row], best_R: Tensor | None = None) -> list[Choice]:
    """One token for each row of logits, changed in place where they are float32; for `best_R` see `choose`."""
    wanted = [r for r, row in enumerate(rows) if row.params.logprobs is not None]
    raw = logits_RV[wanted] if wanted else None
    tokens_R = choose(logits_RV, rows, best_R)
    choices = [Choice.of(token) for token in tokens_R.tolist()]
    if raw is not None:
        counts = [rows[r].params.logprobs or 0 for r in wanted]
        for r, top in zip(wanted, top_logprobs(raw, tokens_R[wanted].clamp(min=0), counts), strict=True):
            choices[r].logprobs = top
    return choices


def choose(logits_RV: Tensor, rows: Sequence[Row], best_R: Tensor | None = None) -> Tensor:
    """[R] tokens of logits (changed in place where they are float32), on their device; -1 where they are not numbers.

    `best_R`, which may become the answer, is what `greedy` says of these logits, where that is known.
    """
    if not all(row.is_plain for row in rows):
        logits_RV, best_R = logits_RV.float(), None
        _forbid_and_bias(logits_RV, rows)
        _penalise(logits_RV, rows)
    tokens_R = kernels.greedy(logits_RV) if best_R is None else best_R
    drawing = [r for r, row in enumerate(rows) if not row.params.is_greedy]
    if drawing:
        places = torch.tensor(drawing).to(logits_RV.device, non_blocking=True)
        some_RV = logits_RV if len(drawing) == len(rows) else logits_RV[places]
        drawn = _draw(some_RV.float(), [rows[r] for r in drawing])
        tokens_R[places] = drawn.where(tokens_R[places] >= 0, -1)
    return tokens_R


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
    params = [row.params for row in rows]
    settings: list[tuple[list[Any], torch.dtype]] = [
        ([one.temperature for one in params], torch.float32),
        ([one.top_k for one in params], torch.int32),
        ([one.top_p for one in params], torch.float32),
        ([one.min_p for one in params], torch.float32),
        ([uniform(row.seed, row.num_output) for row in rows], torch.float64),
    ]
    # Nobody waits for the device here.
    moved = (torch.tensor(v, dtype=d).to(logits_RV.device, non_blocking=True) for v, d in settings)
    return kernels.draw(logits_RV, *moved)
