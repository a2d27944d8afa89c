"""What goes wrong in an engine, one fault at a time: F5-F9, F11, F18, F22 and F23 of the fault catalogue.

Survived means: the culprit's request ends with an error that says why, all others are answered exactly, no block is
lost, and the engine serves on. Mixtures of all of these at random: test_simulation.py. F10 needs grammars.
"""

import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch

from bestiary.config import EngineConfig
from bestiary.engine import Engine
from bestiary.errors import EngineError, RequestError
from bestiary.output import CompletionOutput, Delta, OutputText, RequestOutput
from bestiary.sampling import sampler
from bestiary.sampling.params import SamplingParams
from bestiary.scheduler import Sequence as Tokens
from bestiary.step import StepResult, StepRow
from bestiary.testing import FakeExecutor, expected_answer

pytestmark = pytest.mark.filterwarnings("ignore:a step of .* failed:RuntimeWarning")

VOCABULARY = 5003
BLOCKS, BLOCK_SIZE = 16, 4
PROMPTS = {
    "griffin": [1, 2, 3, 4, 5, 6, 7, 8, 9],
    "phoenix": [1, 2, 3, 4, 5, 6, 7, 8, 10, 11],
    "basilisk": [40],
    "unicorn": [50, 51, 52, 53, 54],
}
CULPRIT = "phoenix"


def greedy(**values: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 9, "detokenize": False, **values})


def engine(executor: FakeExecutor | None = None, tokenizer: Any = None, **settings: Any) -> Engine:
    executor = executor or FakeExecutor(BLOCKS, BLOCK_SIZE, vocabulary=VOCABULARY)
    return Engine(EngineConfig(model="fake", **{"max_num_batched_tokens": 16, **settings}), executor, tokenizer)


def finish(on: Engine) -> dict[str, RequestOutput]:
    """Step until nothing is left, with the books checked after each step."""
    done = {}
    for _ in range(1000):
        if not on.has_unfinished_requests():
            break
        for output in on.step():
            on.check_integrity()
            if output.finished:
                done[output.request_id] = output
    assert not on.has_unfinished_requests(), "it does not come to an end"
    return done


def serve(
    on: Engine,
    prompts: Mapping[str, Sequence[int]] = PROMPTS,
    params: Mapping[str, SamplingParams] | None = None,
) -> dict[str, CompletionOutput]:
    for name, prompt in prompts.items():
        on.add_request(name, prompt, (params or {}).get(name) or greedy())
    return {name: output.outputs[0] for name, output in finish(on).items()}


def expected(name: str) -> list[int]:
    return expected_answer(PROMPTS[name], greedy(), vocabulary=VOCABULARY, max_model_len=64).tokens


def check_exact(answers: Mapping[str, CompletionOutput], names: Iterable[str] = PROMPTS) -> None:
    for name in names:
        assert (answers[name].token_ids, answers[name].finish_reason) == (expected(name), "length"), name


def check_culprit(answer: CompletionOutput, reason: str, name: str = CULPRIT) -> None:
    assert answer.finish_reason == "error" and reason in str(answer.stop_reason)
    assert list(answer.token_ids) == expected(name)[: len(answer.token_ids)]


def check_survived(on: Engine) -> None:
    """No block is held, and the same requests are answered exactly, with what is in the cache by now."""
    assert on.scheduler.cache.is_empty
    on.check_integrity()
    check_exact(serve(on))


OTHERS = PROMPTS.keys() - {CULPRIT}


def rows_of(rows: Sequence[StepRow], name: str) -> list[int]:
    """Which rows compute this prompt: the fake memory is not asked, only what the engine hands over."""
    prompt = PROMPTS[name]
    return [
        place
        for place, row in enumerate(rows)
        if (row.sampling is not None and list(row.sampling.tokens[: len(prompt)]) == prompt)
        or (row.start == 0 and list(row.tokens) == prompt[: len(row.tokens)] and len(row.tokens) > 8)
    ]


# ---- F5, F6: the cache runs out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [5, 6, 7, 9])
def test_f5_an_exhausted_cache_makes_the_youngest_wait_and_changes_no_answer(
    monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    on = engine(FakeExecutor(blocks, BLOCK_SIZE, vocabulary=VOCABULARY))
    preempted: list[str] = []
    preempt = on.scheduler.preempt

    def counted(sequence: Tokens) -> None:
        preempted.append(sequence.id)
        preempt(sequence)

    monkeypatch.setattr(on.scheduler, "preempt", counted)
    check_exact(serve(on))
    assert preempted or blocks > 7
    check_survived(on)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("n", range(1, 20))
def test_f6_the_nth_allocation_fails(monkeypatch: pytest.MonkeyPatch, n: int, caching: bool) -> None:
    on = engine(enable_prefix_caching=caching)
    pool, calls = on.scheduler.cache.pools[0], 0
    take = pool.take

    def fails_once(wanted: int) -> list[int] | None:
        nonlocal calls
        calls += 1
        return None if calls == n else take(wanted)

    monkeypatch.setattr(pool, "take", fails_once)
    check_exact(serve(on))
    assert calls >= min(n, 10)
    check_survived(on)


# ---- F7: the kernel raises -------------------------------------------------------------------------------------------


def failing(fault: Callable[[Sequence[StepRow]], Collection[int]]) -> Engine:
    return engine(FakeExecutor(BLOCKS, BLOCK_SIZE, vocabulary=VOCABULARY, fault=fault))


def test_f7_a_row_that_always_fails_ends_alone() -> None:
    def fault(rows: Sequence[StepRow]) -> Collection[int]:
        if rows_of(rows, CULPRIT):
            raise RuntimeError("illegal memory access")
        return ()

    on = failing(fault)
    answers = serve(on)
    check_exact(answers, OTHERS)
    check_culprit(answers[CULPRIT], "RuntimeError: illegal memory access")
    on.executor.fault = None  # type: ignore[attr-defined]
    check_survived(on)


@pytest.mark.parametrize("after", range(1, 9))
def test_f7_a_row_that_fails_in_the_middle_of_its_answer_keeps_what_it_has(after: int) -> None:
    def fault(rows: Sequence[StepRow]) -> Collection[int]:
        for place in rows_of(rows, CULPRIT):
            sampling = rows[place].sampling
            if sampling is not None and sampling.num_output == after:
                raise OSError("gone")
        return ()

    on = failing(fault)
    answers = serve(on)
    check_exact(answers, OTHERS)
    check_culprit(answers[CULPRIT], "OSError: gone")
    assert len(answers[CULPRIT].token_ids) == after
    on.executor.fault = None  # type: ignore[attr-defined]
    check_survived(on)


def test_f7_a_batch_that_fails_though_each_row_is_well_costs_nobody_anything() -> None:
    def fault(rows: Sequence[StepRow]) -> Collection[int]:
        if len(rows) > 1:
            raise MemoryError("too large together")
        return ()

    on = failing(fault)
    with pytest.warns(RuntimeWarning, match=r"a step of \d+ requests failed.*too large together"):
        check_exact(serve(on))
    check_survived(on)


@pytest.mark.parametrize("n", range(1, 12))
def test_f7_the_nth_step_fails(n: int) -> None:
    """A whole step is tried again row by row; so the fault costs nobody anything."""
    executor = FakeExecutor(BLOCKS, BLOCK_SIZE, vocabulary=VOCABULARY)

    def fault(rows: Sequence[StepRow]) -> Collection[int]:
        if executor.num_steps == n and len(rows) > 1:
            raise RuntimeError("once")
        return ()

    executor.fault = fault
    on = engine(executor)
    check_exact(serve(on))
    check_survived(on)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("n", range(1, 8))
def test_f7_an_interrupted_step_can_be_taken_again(n: int, interruption: type[BaseException]) -> None:
    """What is no error of the model's goes to the caller; nothing of the step has happened."""
    executor = FakeExecutor(BLOCKS, BLOCK_SIZE, vocabulary=VOCABULARY)

    def fault(rows: Sequence[StepRow]) -> Collection[int]:
        if executor.num_steps == n:
            raise interruption
        return ()

    executor.fault = fault
    on = engine(executor)
    with pytest.raises(interruption):
        serve(on)
    on.check_integrity()
    answers = finish(on)
    check_exact({name: output.outputs[0] for name, output in answers.items()})
    check_survived(on)


# ---- F8: logits that are not numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("after", range(9))
def test_f8_logits_that_are_not_finite_end_their_request(after: int) -> None:
    def fault(rows: Sequence[StepRow]) -> Collection[int]:
        places = rows_of(rows, CULPRIT)
        return [p for p in places if (sampling := rows[p].sampling) is not None and sampling.num_output == after]

    on = failing(fault)
    answers = serve(on)
    check_exact(answers, OTHERS)
    check_culprit(answers[CULPRIT], "not finite")
    assert len(answers[CULPRIT].token_ids) == after
    on.executor.fault = None  # type: ignore[attr-defined]
    check_survived(on)


def test_f8_what_turned_out_not_to_be_finite_is_never_found_in_the_cache() -> None:
    """The first chunk of a prompt goes wrong, and only the last one shows it: the blocks were published meanwhile."""
    prompt = list(range(24))
    is_ill = True

    def fault(rows: Sequence[StepRow]) -> Collection[int]:
        return [place for place, row in enumerate(rows) if row.start == 0] if is_ill else ()

    executor = FakeExecutor(BLOCKS, BLOCK_SIZE, vocabulary=VOCABULARY, fault=fault)
    on = engine(executor, max_num_batched_tokens=10)
    assert serve(on, {"first": prompt})["first"].finish_reason == "error"
    is_ill = False
    answer = serve(on, {"second": prompt})["second"]
    assert answer.finish_reason == "length"
    assert answer.token_ids == expected_answer(prompt, greedy(), vocabulary=VOCABULARY, max_model_len=64).tokens


# ---- F9: the sampler raises ------------------------------------------------------------------------------------------


class SamplingExecutor(FakeExecutor):
    """The fake memory under the real sampler: logits are random numbers whose seed is the context's hash."""

    def execute(self, rows: Sequence[StepRow]) -> list[StepResult]:
        results = super().execute(rows)
        drawing = [(row.sampling, result) for row, result in zip(rows, results, strict=True) if row.sampling]
        if drawing:
            logits = [self._logits(result) for _, result in drawing]
            choices = sampler.sample(torch.stack(logits), [row for row, _ in drawing])
            for (_, result), choice in zip(drawing, choices, strict=True):
                result.choice = choice
        return results

    def _logits(self, result: StepResult) -> torch.Tensor:
        assert result.choice is not None and result.choice.token is not None
        return torch.randn(self.vocabulary, generator=torch.Generator().manual_seed(result.choice.token)) * 2


def sampled(name: str) -> SamplingParams:
    """One of every kind of row."""
    kinds: dict[str, dict[str, Any]] = {
        "griffin": {"temperature": 0.0, "repetition_penalty": 1.3},
        "phoenix": {"presence_penalty": 1.25, "top_k": 9},
        "basilisk": {"top_p": 0.8, "logprobs": 2, "seed": 3},
        "unicorn": {"min_p": 0.05, "seed": 4, "logit_bias": {5: 2.0}},
    }
    return SamplingParams(**{"max_tokens": 9, "detokenize": False, "seed": 7, **kinds[name]})


def sampling_engine() -> Engine:
    return engine(SamplingExecutor(BLOCKS, BLOCK_SIZE, vocabulary=VOCABULARY))


def test_f9_a_sampler_that_raises_for_one_row_ends_that_request(monkeypatch: pytest.MonkeyPatch) -> None:
    params = {name: sampled(name) for name in PROMPTS}
    alone = {name: serve(sampling_engine(), {name: PROMPTS[name]}, params)[name] for name in PROMPTS}
    on = sampling_engine()
    assert serve(on, params=params) == alone, "company changed a text"

    penalise = sampler._penalise

    def broken(logits_RV: torch.Tensor, rows: Sequence[sampler.Row]) -> None:
        if any(row.params.presence_penalty == 1.25 and row.num_output == 4 for row in rows):
            raise IndexError("index 5003 is out of bounds")
        penalise(logits_RV, rows)

    monkeypatch.setattr(sampler, "_penalise", broken)
    answers = serve(on, params=params)
    assert {name: answers[name] for name in OTHERS} == {name: alone[name] for name in OTHERS}
    assert answers[CULPRIT].finish_reason == "error" and "IndexError" in str(answers[CULPRIT].stop_reason)
    assert answers[CULPRIT].token_ids == alone[CULPRIT].token_ids[:4]
    monkeypatch.undo()
    assert serve(on, params=params) == alone


# ---- F11: the tokenizer raises ---------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of which some token cannot be decoded."""

    special_ids: frozenset[int] = frozenset()

    def __init__(self, breaks_at: int | None = None) -> None:
        self.breaks_at = breaks_at

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        if self.breaks_at in ids:
            raise UnicodeError(f"token {self.breaks_at} makes no sense")
        return "".join(chr(0x4E00 + token) for token in ids)


def with_text(**values: Any) -> dict[str, SamplingParams]:
    return {name: greedy(detokenize=True, **values) for name in PROMPTS}


@pytest.mark.parametrize("logprobs", [None, 0])
@pytest.mark.parametrize("place", range(9))
def test_f11_a_token_that_cannot_be_decoded_ends_its_request(place: int, logprobs: int | None) -> None:
    """It fails in the text, or where log-probabilities show the token's own text: before anything else sees it."""
    tokenizer = Letters(expected(CULPRIT)[place])
    assert not any(tokenizer.breaks_at in [*PROMPTS[name], *expected(name)] for name in OTHERS)
    on = engine(tokenizer=tokenizer)
    answers = serve(on, params=with_text(logprobs=logprobs))
    check_exact(answers, OTHERS)
    for name in OTHERS:
        assert answers[name].text == Letters().decode(expected(name))
    check_culprit(answers[CULPRIT], "UnicodeError: token")
    check_survived(on)


def test_f11_a_prompt_that_cannot_be_decoded_is_refused_and_leaves_nothing_behind() -> None:
    on = engine(tokenizer=Letters(breaks_at=11))
    for name in OTHERS:
        on.add_request(name, PROMPTS[name], greedy(detokenize=True))
    with pytest.raises(UnicodeError):
        on.add_request(CULPRIT, PROMPTS[CULPRIT], greedy(detokenize=True, n=3))
    on.check_integrity()
    assert len(on.scheduler) == len(OTHERS) and on.abort([CULPRIT]) == []
    check_exact({name: output.outputs[0] for name, output in finish(on).items()}, OTHERS)
    on.tokenizer.breaks_at = None  # type: ignore[union-attr]
    check_survived(on)


def test_f11_a_text_that_cannot_be_ended_at_an_abort_still_gives_its_blocks_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The text that was held back is lost; the tokens and the blocks are not."""
    on = engine(tokenizer=Letters())
    for name in PROMPTS:
        on.add_request(name, PROMPTS[name], greedy(detokenize=True))
    for _ in range(4):
        on.step()
    ends = iter([UnicodeError("half a character"), None])

    def finish_text(text: OutputText) -> Delta:
        if (failure := next(ends)) is not None:
            raise failure
        return Delta("", None)

    monkeypatch.setattr(OutputText, "finish", finish_text)
    outputs = on.abort([CULPRIT, "unicorn"])
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "abort"]
    check_culprit(outputs[0].outputs[0], "UnicodeError: half a character")
    on.check_integrity()
    check_exact({name: output.outputs[0] for name, output in finish(on).items()}, ["griffin", "basilisk"])
    check_survived(on)


# ---- F18: the clock jumps --------------------------------------------------------------------------------------------


def test_f18_a_clock_that_jumps_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(0)
    for clock in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, clock, lambda: chance.uniform(-1e9, 1e9))
    on = engine()
    check_exact(serve(on))
    check_survived(on)


# ---- F22, F23: aborts at the wrong moment ----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(14))
def test_f22_an_abort_may_come_at_any_step_the_last_one_included(steps: int) -> None:
    on = engine()
    for name in PROMPTS:
        on.add_request(name, PROMPTS[name], greedy())
    done: dict[str, RequestOutput] = {}
    for _ in range(steps):
        done.update({output.request_id: output for output in on.step() if output.finished})
    aborted = on.abort([CULPRIT])
    assert len(aborted) == (CULPRIT not in done)
    for output in aborted:
        answer = output.outputs[0]
        assert output.finished and answer.finish_reason == "abort"
        assert answer.token_ids == expected(CULPRIT)[: len(answer.token_ids)]
    on.check_integrity()
    done.update(finish(on))
    check_exact({name: output.outputs[0] for name, output in done.items()}, OTHERS)
    check_survived(on)


def test_f22_an_abort_ends_the_answers_that_are_left_of_a_request() -> None:
    """One of two has met its stop token; the other is aborted, and what the first has said stays."""
    first = expected_answer(
        [7], SamplingParams(seed=0, max_tokens=30), vocabulary=VOCABULARY, max_model_len=64, index=0
    ).tokens
    on = engine()
    params = SamplingParams(seed=0, n=2, max_tokens=30, detokenize=False, stop_token_ids=[first[2]])
    on.add_request("both", [7], params)
    for _ in range(6):
        on.step()
    (output,) = on.abort(["both"])
    assert [answer.finish_reason for answer in output.outputs] == ["stop", "abort"]
    assert output.outputs[0].token_ids == first[:3] and output.outputs[0].stop_reason == first[2]
    check_survived(on)


def test_f23_a_second_abort_and_one_of_nobody_do_nothing() -> None:
    on = engine()
    for name in PROMPTS:
        on.add_request(name, PROMPTS[name], greedy())
    on.step()
    assert [output.request_id for output in on.abort([CULPRIT, "nobody", CULPRIT])] == [CULPRIT]
    assert on.abort([CULPRIT]) == []
    check_exact({name: output.outputs[0] for name, output in finish(on).items()}, OTHERS)
    assert on.abort(PROMPTS) == []
    check_survived(on)


def test_closing_ends_what_runs_and_a_second_time_does_nothing() -> None:
    on = engine()
    serve(on, {"griffin": PROMPTS["griffin"]})
    on.add_request(CULPRIT, PROMPTS[CULPRIT], greedy())
    on.step()
    on.close()
    on.close()
    assert not on.has_unfinished_requests()
    assert on.scheduler.cache.pools[0].num_free == BLOCKS


def test_an_executor_that_promises_more_than_its_cache_holds_is_refused() -> None:
    """Its longest request could never run, and would wait for ever."""
    with pytest.raises(EngineError, match="contexts of 65 tokens, its cache holds 64"):
        engine(FakeExecutor(16, 4, max_model_len=65))


@pytest.mark.parametrize("ends", [[-1], [VOCABULARY], [2**31, -5]])
def test_end_tokens_that_the_model_does_not_have_end_nothing_and_spoil_nothing(ends: list[int]) -> None:
    """They come from a checkpoint's configuration; below min_tokens the sampler forbids what ends an answer."""
    executor = SamplingExecutor(BLOCKS, BLOCK_SIZE, vocabulary=VOCABULARY)
    on = Engine(EngineConfig(model="fake"), executor, None, ends)
    params = {name: greedy(min_tokens=5, logit_bias={VOCABULARY - 1: 50.0}) for name in PROMPTS}
    answers = serve(on, params=params)
    assert {tuple(answer.token_ids) for answer in answers.values()} == {(VOCABULARY - 1,) * 9}


# ---- requests that cannot be served ----------------------------------------------------------------------------------

REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    ([], {}, "the prompt is empty"),
    ([1] * 64, {}, "the prompt has 64 tokens, and max_model_len=64"),
    ([1] * 10_000, {}, "the prompt has 10000 tokens"),
    ([1, -1], {}, "prompt token 1 is -1"),
    ([VOCABULARY], {}, "prompt token 0 is 5003: ids are whole numbers from 0 to 5002"),
    ([2**40], {}, "prompt token 0"),
    ([1, True], {}, "prompt token 1 is True"),
    ([1.0], {}, "prompt token 0 is 1.0"),
    (["1"], {}, "prompt token 0 is '1'"),
    ([None], {}, "prompt token 0 is None"),
    ([[1]], {}, "prompt token 0"),
    ([1], {"logit_bias": {VOCABULARY: 1.0}}, "logit_bias has token id 5003"),
    ([1], {"stop_token_ids": [9999]}, "stop_token_ids has token id 9999"),
    ([1], {"logprobs": 21}, "logprobs=21: at most max_logprobs=20"),
    ([1], {"prompt_logprobs": 10**9}, "prompt_logprobs=1000000000"),
    ([1], {"stop": ["x"], "detokenize": True}, "stop strings need a tokenizer"),
]


@pytest.mark.parametrize(("prompt", "values", "complaint"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_a_request_that_cannot_be_served_is_refused_while_others_run(
    prompt: Any, values: dict[str, Any], complaint: str
) -> None:
    on = engine()
    for name in PROMPTS:
        on.add_request(name, PROMPTS[name], greedy())
    on.step()
    with pytest.raises(RequestError, match=complaint):
        on.add_request("bad", prompt, greedy(**values))
    check_exact({name: output.outputs[0] for name, output in finish(on).items()})
    check_survived(on)


def test_an_id_that_is_in_use_is_refused_and_one_that_was_used_is_free_again() -> None:
    on = engine()
    on.add_request("griffin", PROMPTS["griffin"], greedy())
    with pytest.raises(RequestError, match="'griffin' is in use"):
        on.add_request("griffin", PROMPTS["unicorn"], greedy())
    assert len(on.scheduler) == 1
    finish(on)
    check_exact(serve(on))


def test_parameters_that_were_changed_after_they_were_made_are_checked_again() -> None:
    """And a change after the request was taken concerns it no more."""
    on = engine()
    params = greedy()
    on.add_request("griffin", PROMPTS["griffin"], params)
    params.max_tokens = -5
    with pytest.raises(RequestError, match="max_tokens=-5"):
        on.add_request("unicorn", PROMPTS["unicorn"], params)
    check_exact({name: output.outputs[0] for name, output in finish(on).items()}, ["griffin"])


@pytest.mark.parametrize("salt", ["\ud800", "\0", "x" * 100_000])
def test_any_text_is_a_salt(salt: str) -> None:
    on = engine()
    serve(on, {"griffin": PROMPTS["griffin"]})
    for name, own in (("salted", salt), ("plain", "")):
        on.add_request(name, PROMPTS["griffin"], greedy(), cache_salt=own)
    found = finish(on)
    assert (found["salted"].num_cached_tokens, found["plain"].num_cached_tokens) == (0, 8)
    assert found["salted"].outputs[0].token_ids == found["plain"].outputs[0].token_ids == expected("griffin")
