"""Steps in a row: the same answers as one by one, and no step more than is asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bestiary_kernels as kernels
from bestiary import LLM, SamplingParams
from bestiary.testing.tiny import tiny_checkpoint

PROMPTS = ["a", "The griffin", "The griffin " * 9, "In the beginning " * 3, "x " * 30]
pytestmark = pytest.mark.skipif(
    kernels.status().backend not in ("avx512_bf16", "amx_bf16"), reason="this machine's matrices are oneDNN's"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("m"), "LlamaForCausalLM", dtype=torch.bfloat16)


@pytest.fixture
def bursts(monkeypatch: pytest.MonkeyPatch) -> Callable[[LLM], list[int]]:
    """Begins to note how many steps each burst has."""

    def watch(llm: LLM) -> list[int]:
        replays, found = llm.engine.executor.runner._replays, list[int]()  # type: ignore[attr-defined]
        run_on = replays.run_on

        def noting(*given: Any) -> Any:
            if (tokens := run_on(*given)) is not None:
                found.append(len(tokens))
            return tokens

        monkeypatch.setattr(replays, "run_on", noting)
        return found

    return watch


def made(folder: Path, *, in_a_row: bool = True, **settings: Any) -> LLM:
    llm = LLM(str(folder), enable_prefix_caching=False, **{"max_model_len": 256, **settings})
    if not in_a_row:
        llm.engine.executor.runner.ahead = None  # type: ignore[attr-defined]
    return llm


def tokens(llm: LLM, params: SamplingParams | list[SamplingParams], prompts: list[str] = PROMPTS) -> list[Any]:
    return [
        (list(one.outputs[0].token_ids), one.outputs[0].finish_reason, one.outputs[0].stop_reason)
        for one in llm.generate(prompts, params, use_tqdm=False)
    ]


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_tokens_are_those_of_single_steps(
    folder: Path, bursts: Callable[[LLM], list[int]], block_size: int, count: int
) -> None:
    params = [SamplingParams(temperature=0, max_tokens=23 + 11 * n, ignore_eos=True) for n in range(count)]
    llm, plain = made(folder, block_size=block_size), made(folder, in_a_row=False, block_size=block_size)
    found = bursts(llm)
    assert tokens(llm, params, PROMPTS[:count]) == tokens(plain, params, PROMPTS[:count])
    assert all(steps <= block_size for steps in found)
    assert max(found, default=0) > 1 or block_size == 1
    llm.engine.check_integrity()


def test_a_token_that_ends_an_answer_is_the_last_of_its_burst(folder: Path, bursts: Callable[[LLM], list[int]]) -> None:
    llm, plain = made(folder), made(folder, in_a_row=False)
    free = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    ends = [sorted(set(one[0][30:32])) for one in tokens(plain, free)]
    params = [SamplingParams(temperature=0, max_tokens=60, stop_token_ids=ids) for ids in ends]
    found = bursts(llm)
    answers = tokens(llm, params)
    assert answers == tokens(plain, params)
    assert any(reason == "stop" for _, reason, _ in answers)
    # Alone, an answer takes no step beyond its end: of its tokens the prompt gives the first, and single steps others.
    found.clear()
    ((ids, _, _),) = tokens(llm, params[1], PROMPTS[1:2])
    assert 0 < sum(found) < len(ids)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1, seed=3, max_tokens=20),
        SamplingParams(temperature=0, max_tokens=20, logprobs=1),
        SamplingParams(temperature=0, max_tokens=20, repetition_penalty=1.2),
        SamplingParams(temperature=0, max_tokens=20, stop=["zz"]),
    ],
    ids=["drawn", "logprobs", "penalty", "stop string"],
)
def test_what_is_more_than_the_likeliest_token_goes_step_by_step(
    folder: Path, bursts: Callable[[LLM], list[int]], params: SamplingParams
) -> None:
    llm = made(folder)
    found = bursts(llm)
    plain = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    expected = tokens(made(folder, in_a_row=False), [params, plain], PROMPTS[:2])
    assert tokens(llm, [params, plain], PROMPTS[:2]) == expected
    assert found == []


def test_whoever_reads_along_gets_each_token_when_it_is_there(folder: Path, bursts: Callable[[LLM], list[int]]) -> None:
    llm = made(folder)
    found = bursts(llm)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    *_, last = llm.stream("The griffin", params)
    assert found == []
    assert [(list(last.outputs[0].token_ids), "length", None)] == tokens(llm, params, ["The griffin"])


def test_a_request_that_comes_between_waits_for_no_step_twice(folder: Path, bursts: Callable[[LLM], list[int]]) -> None:
    """Of those that are on their way the tokens are known; the newcomer's are computed beside."""
    llm = made(folder)
    engine, found = llm.engine, bursts(llm)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
    prompts = [[5, 6, 7], [9, 8, 7, 6]]
    engine.add_request("0", prompts[0], params, final_only=True)
    done = []
    for _ in range(5):
        done += engine.step()
    engine.add_request("1", prompts[1], params, final_only=True)
    while engine.has_unfinished_requests():
        done += engine.step()
    together = {one.request_id: list(one.outputs[0].token_ids) for one in done}
    plain = made(folder, in_a_row=False)
    alone = [one.outputs[0].token_ids for p in prompts for one in plain.generate([p], params, use_tqdm=False)]
    assert [together["0"], together["1"]] == [list(ids) for ids in alone]
    assert found
    assert max(found) > 1
    engine.check_integrity()


def test_after_a_preemption_steps_are_computed_again(
    folder: Path, bursts: Callable[[LLM], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    few = {"num_gpu_blocks_override": 24, "block_size": 5, "max_model_len": 120}
    llm, preempted = made(folder, **few), list[object]()
    scheduler, preempt = llm.engine.scheduler, llm.engine.scheduler.preempt
    monkeypatch.setattr(scheduler, "preempt", lambda sequence: preempted.append(sequence) or preempt(sequence))
    found = bursts(llm)
    assert tokens(llm, params) == tokens(made(folder, in_a_row=False, **few), params)
    assert preempted
    assert max(found) > 1
    llm.engine.check_integrity()
