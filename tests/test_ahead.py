"""Steps that run ahead of the engine: the same answers as without, whoever comes, ends, draws or is interrupted.

On a CPU nothing is won by it, and it is off; here it runs over a stand-in of a graph.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from bestiary import LLM, SamplingParams, registry
from bestiary.ahead import Ahead, _Flight
from bestiary.engine import Engine
from bestiary.replay import Found
from bestiary.testing.fixture import Fixture

PROMPTS = [[3 + (n * k) % 50 for k in range(2 + n % 7 * 3)] for n in range(14)]


class Again:
    """What a graph does, without a GPU: the same function over the same memory, its results in one place."""

    def __init__(self, function: Callable[[], Found]) -> None:
        self._function, self._output = function, function()

    def replay(self) -> Found:
        found = self._function()
        self._output.logits_RV.copy_(found.logits_RV)
        self._output.best_R.copy_(found.best_R)
        return self._output


def captured(function: Callable[[], Found]) -> tuple[Found, Again]:
    """As a graph is: the step is run twice before, which must come to the same as once."""
    function()
    return function(), Again(function)


def fixture_of(name: str, place: Path) -> Fixture:
    cases = registry.find(name).load().proof
    assert cases is not None
    return Fixture(name, import_module(cases).CASES[0], place)


def checkpoint(name: str, place: Path) -> Path:
    return fixture_of(name, place).folder


def sees_ahead(engine: Engine) -> None:
    """From now on, as on a GPU."""
    runner = engine.executor.runner  # type: ignore[attr-defined]
    runner._replays._record = captured
    runner.ahead = Ahead(runner._replays, runner.groups, runner.block_size, runner.max_model_len)
    engine.scheduler.early = runner.max_model_len


def served(folder: Path, *, ahead: bool, **settings: Any) -> LLM:
    settings |= {"kv_cache_memory_bytes": 2**24} if "num_gpu_blocks_override" not in settings else {}
    llm = LLM(
        str(folder),
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=96,
        block_size=5,
        max_num_seqs=6,
        enable_prefix_caching=False,
        **settings,
    )
    runner = llm.engine.executor.runner  # type: ignore[attr-defined]
    runner._replays._record = captured if ahead else lambda function: (function(), None)
    runner._replays.sizes = range(1, 9)
    if ahead:
        runner.ahead = Ahead(runner._replays, runner.groups, runner.block_size, runner.max_model_len)
        llm.engine.scheduler.early = runner.max_model_len
    return llm


def tokens(llm: LLM, params: list[SamplingParams]) -> list[list[int]]:
    outputs = llm.generate(PROMPTS[: len(params)], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MambaForCausalLM", "Gemma2ForCausalLM", "JambaForCausalLM"])
def test_answers_are_the_same(tmp_path: Path, name: str) -> None:
    folder = checkpoint(name, tmp_path)
    params = [
        SamplingParams(temperature=n % 3 / 2, seed=n, max_tokens=5 + 3 * n, ignore_eos=n % 2 == 0, detokenize=False)
        for n in range(14)
    ]
    assert tokens(served(folder, ahead=True), params) == tokens(served(folder, ahead=False), params)


@pytest.mark.parametrize(
    "name", ["BartForConditionalGeneration", "MllamaForConditionalGeneration", "Qwen2VLForConditionalGeneration"]
)
def test_so_they_are_of_models_that_see_more_than_tokens(tmp_path: Path, name: str) -> None:
    """Texts and pictures that layers look at, and positions on several axes; a prompt without any keeps its company."""
    fixture = fixture_of(name, tmp_path)
    plain, ahead = fixture.engine(block_size=5), fixture.engine(block_size=5, max_num_seqs=5)
    wanted = [answer.tokens for answer in fixture.answers(plain, fixture.samples)]
    sees_ahead(ahead)
    replays = ahead.executor.runner._replays  # type: ignore[attr-defined]
    replays.sizes = (2, 6)  # so that rows are added that come to nothing
    for samples in (fixture.samples, fixture.samples[:1]):
        assert [answer.tokens for answer in fixture.answers(ahead, samples)] == wanted[: len(samples)]
    assert {key.size for key, step in replays._steps.items() if step.recording is not None} == {2, 6}


def test_so_they_are_where_some_want_more_than_tokens_and_blocks_are_few(tmp_path: Path) -> None:
    folder = checkpoint("LlamaForCausalLM", tmp_path)
    params = [SamplingParams(temperature=0, max_tokens=9 + 5 * n, ignore_eos=True, detokenize=False) for n in range(12)]
    params[2].logprobs, params[5].repetition_penalty, params[7].presence_penalty = 2, 1.3, 0.5
    few = {"num_gpu_blocks_override": 24}
    scarce = served(folder, ahead=True, **few)
    assert tokens(scarce, params) == tokens(served(folder, ahead=False, **few), params)


def test_a_steady_step_was_always_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = served(checkpoint("LlamaForCausalLM", tmp_path), ahead=True)
    calls: list[bool] = []
    replays = llm.engine.executor.runner._replays  # type: ignore[attr-defined]
    run = replays.run
    monkeypatch.setattr(replays, "run", lambda rows, tokens=None: calls.append(tokens is not None) or run(rows, tokens))
    tokens(llm, [SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, detokenize=False)] * 4)
    assert (
        calls.count(True) == 28
    )  # the prompts' step chose the first token, and the second one's step was not foreseen
    assert calls[-1] and not any(calls[:2])


def test_others_go_on_where_one_is_aborted_and_another_one_comes(tmp_path: Path) -> None:
    folder = checkpoint("LlamaForCausalLM", tmp_path)
    found = []
    for ahead in (True, False):
        llm = served(folder, ahead=ahead)
        engine, done = llm.engine, {}
        params = SamplingParams(temperature=0, max_tokens=25, ignore_eos=True, detokenize=False)
        for n in range(4):
            engine.add_request(str(n), [5 + n, 6, 7], params, final_only=True)
        for step in range(60):
            if step == 8:
                engine.abort(["1"])
            if step == 11:
                engine.add_request("late", [9, 9, 9, 9], params, final_only=True)
            for output in engine.step():
                done[output.request_id] = list(output.outputs[0].token_ids)
        engine.check_integrity()
        found.append(done)
    assert found[0] == found[1] and sorted(found[0]) == ["0", "2", "3", "late"]


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MambaForCausalLM"])
def test_after_an_interruption_a_step_is_taken_again(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(name, tmp_path)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
    found = []
    for ahead in (True, False):
        engine = served(folder, ahead=ahead).engine
        land, count, done = _Flight.land, iter(range(1000)), {}

        def interrupted(
            flight: _Flight, land: Callable[[_Flight], list[int]] = land, count: "iter[int]" = count
        ) -> list[int]:
            if next(count) % 3 == 1:
                raise KeyboardInterrupt
            return land(flight)

        with monkeypatch.context() as patch:
            patch.setattr(_Flight, "land", interrupted)
            for n in range(3):
                engine.add_request(str(n), [5 + n, 6, 7], params, final_only=True)
            while engine.has_unfinished_requests():
                try:
                    for output in engine.step():
                        done[output.request_id] = list(output.outputs[0].token_ids)
                except KeyboardInterrupt:
                    continue
        found.append(done)
    assert found[0] == found[1] and len(found[0]) == 3
