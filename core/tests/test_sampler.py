"""The sampler against a naive one in plain Python, transformers' processors, and exact probabilities."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bestiary.sampling import sampler
from bestiary.sampling.params import SamplingParams
from bestiary.sampling.sampler import Row, sample, top_logprobs, uniform

NEVER = -math.inf


def row(
    tokens: Sequence[int] = (0,), num_prompt: int = 1, seed: int = 0, end_ids: Sequence[int] = (), **params: Any
) -> Row:
    return Row(SamplingParams(**params), tokens, num_prompt, seed, end_ids)


def logits(shape: tuple[int, ...], seed: int = 0, spread: float = 2.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


def tokens_of(logits_RV: Tensor, rows: Sequence[Row]) -> list[int | None]:
    return [choice.token for choice in sample(logits_RV.clone(), rows)]


# ---- an independent implementation: lists, loops and float64 ---------------------------------------------------------


def naive_scores(values: Sequence[float], one: Row) -> list[float]:
    """Logits after bias, forbidden tokens and penalties."""
    params, scores = one.params, list(values)
    for token, bias in (params.logit_bias or {}).items():
        scores[token] += bias
    answer = list(one.tokens[one.num_prompt :])
    if len(answer) < params.min_tokens:
        for token in one.end_ids:
            scores[token] = NEVER
    for token in set(one.tokens):
        factor = params.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token, times in Counter(answer).items():
        scores[token] -= params.presence_penalty + times * params.frequency_penalty
    return scores


def naive_probabilities(values: Sequence[float], one: Row) -> list[float]:
    """What each token's chance must be."""
    params = one.params
    scores = [score / params.temperature for score in naive_scores(values, one)]
    scores = [score if score >= max(scores) + math.log(params.min_p or 1e-300) else NEVER for score in scores]
    if params.top_k > 0:
        least = sorted(scores, reverse=True)[min(params.top_k, len(scores)) - 1]
        scores = [score if score >= least else NEVER for score in scores]
    weights = [math.exp(score - max(scores)) for score in scores]
    if params.top_p < 1:
        ranked = sorted(range(len(weights)), key=lambda token: -weights[token])
        kept, mass = set(), 0.0
        for token in ranked:
            if mass >= params.top_p * sum(weights):
                break
            kept.add(token)
            mass += weights[token]
        weights = [weight if token in kept else 0.0 for token, weight in enumerate(weights)]
    return [weight / sum(weights) for weight in weights]


def inverted(probabilities: Sequence[float], at: float) -> set[int]:
    """The token at this place of the cumulative distribution; both neighbours within a rounding error of a border."""
    found, before = set(), 0.0
    for token, probability in enumerate(probabilities):
        if probability > 0 and before - 1e-5 <= at < before + probability + 1e-5:
            found.add(token)
        before += probability
    return found


def check_against(probabilities: Sequence[float], values: Tensor, rows: Sequence[Row]) -> None:
    """Every row, which has these logits, draws what its own seed and position say."""
    drawn = tokens_of(values.repeat(len(rows), 1), rows)
    clear = 0
    for one, token in zip(rows, drawn, strict=True):
        allowed = inverted(probabilities, uniform(one.seed, one.num_output))
        assert token in allowed
        clear += len(allowed) == 1
    assert clear > 0.9 * len(rows)


# ---- greedy ----------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_most_likely_token() -> None:
    values = logits((200, 321))
    expected = [line.index(max(line)) for line in values.tolist()]
    assert tokens_of(values, [row(temperature=0.0) for _ in range(200)]) == expected


@pytest.mark.parametrize("vocabulary", [5, 64, 1000, 49152])
def test_of_equally_likely_tokens_greedy_takes_the_lowest(vocabulary: int) -> None:
    values = torch.zeros(3, vocabulary)
    values[1, [2, 4]] = 1.0
    values[2, [vocabulary - 2, vocabulary - 1]] = 5.0
    assert tokens_of(values, [row(temperature=0.0)] * 3) == [0, 2, vocabulary - 2]


def test_a_tiny_temperature_is_greedy() -> None:
    values = torch.tensor([[1.0, 1.0000001, 0.0]])
    assert tokens_of(values, [row(temperature=9e-6, top_k=5, top_p=0.9, min_p=0.1)]) == [1]


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": {3: 100.0, 7: -100.0}},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"presence_penalty": 1.5},
        {"presence_penalty": -2.0},
        {"frequency_penalty": 0.9},
        {"frequency_penalty": -0.4},
        {"min_tokens": 9},
        {"min_tokens": 8},
        {"logit_bias": {1: 2.5}, "repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.2},
    ],
    ids=str,
)
def test_bias_penalties_and_forbidden_tokens_are_as_defined(params: dict[str, Any]) -> None:
    """Eight tokens of an answer after three of a prompt; greedy, so that the scores themselves are compared."""
    chance = random.Random(0)
    values = logits((100, 12), spread=1.0)
    rows = [
        row([chance.randrange(12) for _ in range(11)], 3, end_ids=(0, 5), temperature=0.0, max_tokens=99, **params)
        for _ in range(100)
    ]
    changed = 0
    for line, one, token in zip(values.tolist(), rows, tokens_of(values, rows), strict=True):
        scores = naive_scores(line, one)
        assert token is not None and scores[token] == pytest.approx(max(scores), abs=1e-5)
        changed += token != line.index(max(line))
    assert changed > 0 or params == {"min_tokens": 8}


# ---- drawing ---------------------------------------------------------------------------------------------------------

DRAWING: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 500},
    {"top_k": -1},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 0.01},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"top_k": 6, "top_p": 0.6},
    {"top_k": 6, "top_p": 0.9, "min_p": 0.05, "temperature": 1.5},
    {"top_p": 0.9, "min_p": 0.2},
    {"repetition_penalty": 1.4, "temperature": 0.7},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5, "top_p": 0.8},
    {"logit_bias": {2: 3.0, 9: -100.0}, "top_k": 3},
    {"min_tokens": 6, "top_p": 0.9},
]


@pytest.mark.parametrize("params", DRAWING, ids=str)
def test_a_draw_inverts_the_naive_distribution(params: dict[str, Any]) -> None:
    for seed in range(4):
        values = logits((1, 40), seed)
        rows = [row([1, 2, 2, 9, 9], 2, draw, end_ids=(4, 5), max_tokens=99, **params) for draw in range(150)]
        check_against(naive_probabilities(values[0].tolist(), rows[0]), values, rows)


@pytest.mark.parametrize(
    ("params", "processors"),
    [
        ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
        ({"top_k": 7}, [TopKLogitsWarper(7)]),
        ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"repetition_penalty": 1.8}, [RepetitionPenaltyLogitsProcessor(1.8)]),
        (
            {"repetition_penalty": 0.7, "temperature": 1.4, "min_p": 0.02, "top_k": 20, "top_p": 0.8},
            [
                RepetitionPenaltyLogitsProcessor(0.7),
                TemperatureLogitsWarper(1.4),
                MinPLogitsWarper(0.02),
                TopKLogitsWarper(20),
                TopPLogitsWarper(0.8),
            ],
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_draw_inverts_the_distribution_that_transformers_makes(params: dict[str, Any], processors: list[Any]) -> None:
    seen = [3, 3, 8, 11]
    for seed in range(4):
        values = logits((1, 300), seed)
        scores = values.clone()
        for processor in processors:
            scores = processor(torch.tensor([seen]), scores)
        rows = [row(seen, 2, draw, **params) for draw in range(150)]
        check_against(scores.double().softmax(-1)[0].tolist(), values, rows)


@pytest.mark.parametrize("params", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str)
def test_tokens_come_as_often_as_they_should(params: dict[str, Any]) -> None:
    """Pearson's chi-square over 20,000 seeds, and over 20,000 positions of one seed."""
    values = logits((1, 9), 5, spread=1.0)
    expected = naive_probabilities(values[0].tolist(), row(**params))
    n = 20_000
    prompt = range(n)  # `row` looks at its tokens only where a penalty asks for them
    for rows in (
        [row(seed=draw, **params) for draw in range(n)],
        [Row(SamplingParams(**params), prompt[: 1 + place], 1, 7) for place in range(n)],
    ):
        counts = Counter(tokens_of(values.expand(n, -1), rows))
        likely = [token for token, probability in enumerate(expected) if probability > 0]
        assert set(counts) <= set(likely)
        chi_square = sum((counts[t] - n * expected[t]) ** 2 / (n * expected[t]) for t in likely)
        assert chi_square < 45  # for up to 8 degrees of freedom: once in two million


def test_tokens_that_tie_at_a_border_stay_together() -> None:
    """No order among equals is invented: what top-k and top-p would have to choose between, they keep."""
    values = torch.tensor([[3.0, 2.0, 2.0, 2.0, 0.0]])
    for params in ({"top_k": 2}, {"top_p": 0.6}):
        drawn = tokens_of(values.repeat(3000, 1), [row(seed=draw, **params) for draw in range(3000)])
        assert set(drawn) == {0, 1, 2, 3}


def test_a_nucleus_that_ends_exactly_at_p_takes_nothing_more() -> None:
    """Probabilities of a half, a quarter and an eighth twice: three quarters are reached with two tokens."""
    values = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    for top_p, support in ((0.5, {0}), (0.501, {0, 1}), (0.74, {0, 1}), (0.76, {0, 1, 2, 3})):
        drawn = tokens_of(values.repeat(2000, 1), [row(seed=draw, top_p=top_p) for draw in range(2000)])
        assert set(drawn) == support, top_p


@pytest.mark.parametrize("at", [0.0, 1 - 2**-53])
def test_tokens_that_cannot_come_never_do_at_either_end(monkeypatch: pytest.MonkeyPatch, at: float) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: at)
    values = logits((64, 501), 3)
    values[:, [0, 1, 499, 500]] = NEVER
    assert tokens_of(values, [row()] * 64) == [2 if at == 0 else 498] * 64
    values[:, 2:250] = values[:, 300:499] = -9.0
    rows = [row(**params) for params in ({"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.5})]
    for token in tokens_of(values, rows * 16):
        assert token is not None and 250 <= token < 300


# ---- large vocabularies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [{"top_p": 0.9}, {"top_p": 0.2}, {"top_k": 3000}, {"top_k": 3000, "top_p": 0.7}, {"min_p": 0.001, "top_p": 0.97}],
    ids=str,
)
def test_a_nucleus_of_thousands_of_tokens_is_found_whole(params: dict[str, Any]) -> None:
    """Nearly flat, so that the first look at the 1024 largest is not enough."""
    values = logits((1, 6000), 1, spread=0.3)
    rows = [row(seed=draw, **params) for draw in range(120)]
    expected = naive_probabilities(values[0].tolist(), rows[0])
    assert sum(probability > 0 for probability in expected) > 700
    drawn = tokens_of(values.repeat(len(rows), 1), rows)
    for one, token in zip(rows, drawn, strict=True):
        assert token in inverted(expected, uniform(one.seed, 0))


# ---- company ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [7, 1001, 3000, 50_257])
def test_a_rows_draw_is_the_same_alone_and_in_any_company(vocabulary: int) -> None:
    """To the last bit of its log-probabilities; among the company are rows that are not numbers."""
    chance = random.Random(vocabulary)
    for trial in range(3):
        values = logits((24, vocabulary), trial, spread=chance.choice((0.2, 1.0, 4.0)))
        values[5] = math.nan
        rows = [
            row(
                [chance.randrange(vocabulary) for _ in range(12)],
                4,
                chance.getrandbits(60),
                end_ids=(1,),
                temperature=chance.choice((0.0, 0.5, 1.0, 1.7)),
                top_p=chance.choice((1.0, 0.9, 0.5)),
                top_k=chance.choice((0, 1, 5, 50, 1200)),
                min_p=chance.choice((0.0, 0.0, 0.05)),
                repetition_penalty=chance.choice((1.0, 1.2)),
                frequency_penalty=chance.choice((0.0, 0.5)),
                logit_bias=chance.choice((None, {2: 1.0})),
                min_tokens=chance.choice((0, 12)),
                logprobs=chance.choice((None, 0, 3)),
            )
            for _ in range(24)
        ]
        together = sample(values.clone(), rows)
        alone = [sample(values[place : place + 1].clone(), [one])[0] for place, one in enumerate(rows)]
        order = chance.sample(range(24), 24)
        shuffled = sample(values[order], [rows[place] for place in order])
        for place in range(24):
            if place != 5:
                assert together[place] == alone[place] == shuffled[order.index(place)]
        assert together[5].token is None


# ---- log-probabilities -----------------------------------------------------------------------------------------------


def test_logprobs_and_ranks_are_those_of_the_raw_logits() -> None:
    values = logits((8, 200))
    expected = values.double().log_softmax(-1)
    rows = [
        row([1, 2, 3], 1, place, logprobs=place % 4, temperature=place % 2, repetition_penalty=1.5, top_k=9)
        for place in range(8)
    ]
    for place, choice in enumerate(sample(values.clone(), rows)):
        top, count = choice.logprobs, place % 4
        assert top is not None and choice.token is not None
        best = expected[place].topk(count)
        assert top.token_ids == [choice.token, *best.indices.tolist()]
        assert top.logprobs == pytest.approx([expected[place, choice.token].item(), *best.values.tolist()], abs=1e-5)
        assert top.rank == 1 + int((expected[place] > expected[place, choice.token]).sum())


def test_only_rows_that_ask_get_logprobs() -> None:
    choices = sample(logits((3, 50)), [row(), row(logprobs=0), row(temperature=0.0, logprobs=50)])
    assert choices[0].logprobs is None
    assert choices[1].logprobs is not None and choices[1].logprobs.token_ids == [choices[1].token]
    assert choices[2].logprobs is not None and choices[2].logprobs.token_ids[0] == choices[2].logprobs.token_ids[1]
    assert choices[2].logprobs.rank == 1


def test_more_logprobs_than_tokens_are_all_tokens() -> None:
    (found,) = top_logprobs(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([0]), [9])
    assert found.token_ids == [0, 2, 1, 0] and found.rank == 3
    assert sum(map(math.exp, found.logprobs[1:])) == pytest.approx(1.0, abs=1e-6)


# ---- logits that are not numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 3, "min_p": 0.1}], ids=str)
@pytest.mark.parametrize("harm", ["nan", "all nan", "inf", "all inf", "all -inf"])
def test_a_row_without_finite_logits_has_no_token_and_the_others_have_theirs(harm: str, params: dict[str, Any]) -> None:
    values = logits((4, 2000))
    rows = [row(seed=place, **params) for place in range(4)]
    expected = tokens_of(values, rows)
    values[2, slice(None) if harm.startswith("all") else 17] = float(harm.removeprefix("all "))
    found = tokens_of(values, rows)
    assert found == [*expected[:2], None, expected[3]]


def test_tokens_that_are_impossible_do_not_spoil_a_row() -> None:
    values = torch.full((2, 30), NEVER)
    values[:, 11] = -3.0
    assert tokens_of(values, [row(temperature=0.0), row(top_p=0.5, top_k=4, min_p=0.5)]) == [11, 11]


# ---- the random numbers ----------------------------------------------------------------------------------------------


def test_the_random_numbers_are_uniform_over_seeds_and_over_positions() -> None:
    """Kolmogorov and Smirnov's largest distance; beyond 2.7 / sqrt(n) once in a million."""
    n = 20_000
    for numbers in ([uniform(seed, 3) for seed in range(n)], [uniform(-5, place) for place in range(n)]):
        assert all(0 <= number < 1 for number in numbers) and len(set(numbers)) == n
        ordered = sorted(numbers)
        distance = max(max((i + 1) / n - x, x - i / n) for i, x in enumerate(ordered))
        assert distance < 2.7 / math.sqrt(n)
        products = [(a - 0.5) * (b - 0.5) for a, b in pairwise(numbers)]
        assert abs(sum(products) / n) < 6 / (12 * math.sqrt(n)), "one number tells something of the next"


def test_the_largest_digest_is_still_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest:
        def digest(self) -> bytes:
            return b"\xff" * 8

    monkeypatch.setattr(sampler, "blake2b", lambda data, digest_size: Largest())
    assert uniform(0, 0) == 1 - 2**-53


def test_a_number_depends_on_seed_and_position_alone() -> None:
    assert uniform(2**63 - 1, 0) == uniform(2**63 - 1, 0) != uniform(-(2**63), 0)
    assert uniform(1, 2) != uniform(2, 1)
