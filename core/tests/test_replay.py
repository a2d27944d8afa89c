"""Recorded decode steps: the same numbers as without a recording, for any rows, blocks and positions."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bestiary_kernels as kernels
from bestiary import LLM, SamplingParams
from bestiary.replay import Found
from bestiary.testing.recipe import randomise
from bestiary.testing.tiny import tiny_checkpoint

#: Where matrices of bfloat16 are kernels of ours, a step is recorded; elsewhere it must run as well, unrecorded.
RECORDS = kernels.status().backend in ("avx512_bf16", "amx_bf16")


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied head"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("m")
    return tiny_checkpoint(folder, "LlamaForCausalLM", dtype=torch.bfloat16, tied=request.param)


def answers(llm: LLM, prompts: list[str], params: SamplingParams) -> list[tuple[list[int], list[float]]]:
    found = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        answer = output.outputs[0]
        assert answer.logprobs is not None
        logprobs = [step[t].logprob for step, t in zip(answer.logprobs, answer.token_ids, strict=True)]
        found.append((list(answer.token_ids), logprobs))
    return found


@pytest.mark.parametrize("num_rows", [1, 2, 5, 7, 32, 65])
def test_a_recorded_step_computes_the_same_numbers(folder: Path, num_rows: int) -> None:
    prompts = ["The griffin " * (n % 40 + 1) for n in range(num_rows)]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=0)
    recorded, plain = (LLM(str(folder), max_model_len=640, block_size=5) for _ in range(2))
    runner = plain.engine.executor.runner  # type: ignore[attr-defined]
    runner._replays = runner.ahead = None
    assert answers(recorded, prompts, params) == answers(plain, prompts, params)
    # The recording serves other sequences, in other blocks, and steps of fewer rows.
    assert answers(recorded, prompts[:1], params) == answers(plain, prompts[:1], params)


@pytest.mark.skipif(not RECORDS, reason="this machine's matrices are oneDNN's")
def test_decode_steps_of_few_rows_are_recorded_once_for_each_number_of_rows(folder: Path) -> None:
    llm = LLM(str(folder), max_model_len=256)
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    llm.generate(["a", "b", "c"], params, use_tqdm=False)
    llm.generate(["a"], params, use_tqdm=False)
    steps = llm.engine.executor.runner._replays._steps  # type: ignore[attr-defined]
    assert sorted(key.size for key in steps) == [1, 3]
    assert all(step.recording is not None for step in steps.values())


@pytest.mark.skipif(not RECORDS, reason="this machine's matrices are oneDNN's")
def test_what_was_forgotten_is_recorded_anew_and_elsewhere(folder: Path) -> None:
    """On a GPU, memory whose recordings are all gone takes no other."""
    llm = LLM(str(folder), max_model_len=256)
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    first = llm.generate(["a"], params, use_tqdm=False)[0].outputs[0].token_ids
    replays = llm.engine.executor.runner._replays  # type: ignore[attr-defined]
    before = replays._record.keywords["arena"]
    replays.forget()
    assert replays._record.keywords["arena"] is not before
    assert llm.generate(["a"], params, use_tqdm=False)[0].outputs[0].token_ids == first
    assert [step.recording is not None for step in replays._steps.values()] == [True]


def test_float32_runs_unrecorded_where_onednn_has_the_matrices(tmp_path: Path) -> None:
    llm = LLM(str(tiny_checkpoint(tmp_path, "LlamaForCausalLM")), max_model_len=256)
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    first = llm.generate(["a"], params, use_tqdm=False)[0].outputs[0].token_ids
    assert llm.generate(["a"], params, use_tqdm=False)[0].outputs[0].token_ids == first


class Again:
    """What a graph does, without a GPU: the same function over the same memory."""

    def __init__(self, function: Callable[[], Found]) -> None:
        self.replay = function


@pytest.mark.parametrize("num_rows", [1, 3, 5, 9, 20])
def test_steps_of_sizes_that_are_not_captured_get_rows_that_come_to_nothing(tmp_path: Path, num_rows: int) -> None:
    """As on a GPU: the rows beyond the sequences' own write nowhere, and nobody sees what they give."""
    folder = tiny_checkpoint(tmp_path, "LlamaForCausalLM")
    prompts = ["The griffin " * (n % 9 + 1) for n in range(num_rows)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
    padded, plain = (LLM(str(folder), max_model_len=256, block_size=5) for _ in range(2))
    runner, other = (llm.engine.executor.runner for llm in (padded, plain))  # type: ignore[attr-defined]
    runner._replays.sizes = (2, 8, 24)
    runner._replays._record = lambda function: (function(), Again(function))
    other._replays = other.ahead = None
    for count in (num_rows, 1):
        for found, wanted in zip(
            answers(padded, prompts[:count], params), answers(plain, prompts[:count], params), strict=True
        ):
            assert found[0] == wanted[0]
            assert found[1] == pytest.approx(wanted[1], abs=1e-5)
    sizes = {2, 8 if num_rows <= 8 else 24} - ({8, 24} if num_rows == 1 else set())
    assert {key.size for key in runner._replays._steps} == sizes


#: A stack of state spaces, and one with attention among them: one group of layers, and two.
RECURRENT = {
    "MambaForCausalLM": {"model_type": "mamba", "hidden_size": 64, "time_step_rank": 16, "num_hidden_layers": 2},
    "JambaForCausalLM": {
        "model_type": "jamba",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "mamba_dt_rank": 16,
    },
}


@pytest.fixture(scope="module", params=RECURRENT)
def recurrent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tiny_checkpoint(tmp_path_factory.mktemp("m"), "LlamaForCausalLM")  # for its tokenizer
    settings = {"vocab_size": 384, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 2, **RECURRENT[request.param]}
    config = transformers.AutoConfig.for_model(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model, torch.Generator().manual_seed(0))
    model.bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("num_rows", [1, 5, 65])
def test_a_recorded_step_of_a_state_space_computes_the_same_numbers(recurrent: Path, num_rows: int) -> None:
    prompts = ["a", *("The griffin " * (n % 40 + 1) for n in range(1, num_rows))]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=0)
    recorded, plain = (LLM(str(recurrent), max_model_len=640, block_size=5) for _ in range(2))
    runner = plain.engine.executor.runner  # type: ignore[attr-defined]
    runner._replays = runner.ahead = None
    assert answers(recorded, prompts, params) == answers(plain, prompts, params)
    # The recording serves other sequences, in other slots, and a sequence that only begins: its prompt is one token.
    steps = recorded.engine.executor.runner._replays._steps  # type: ignore[attr-defined]
    assert all((step.recording is not None) == RECORDS for step in steps.values())
    assert answers(recorded, prompts[:1], params) == answers(plain, prompts[:1], params)
    assert answers(recorded, prompts[-1:], params) == answers(plain, prompts[-1:], params)
