"""Recorded decode steps of models with experts, latent rows, windows, pictures: the same numbers as unrecorded ones.

With adapters too, they ask for no number that a GPU would be waited for.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import bestiary_kernels as kernels
from bestiary import registry
from bestiary.replay import Replays
from bestiary.testing import lora_checks
from bestiary.testing.fixture import Answer, Fixture

pytest.importorskip("transformers")

#: Where matrices of bfloat16 are kernels of ours, a step is recorded; elsewhere it must run as well, unrecorded.
RECORDS = kernels.status().backend in ("avx512_bf16", "amx_bf16")
#: By the name of the case. With a window prompts reach it, and answers go on beyond it.
CASES = {
    "BartForConditionalGeneration": "large",
    "DeepseekForCausalLM": "16B",
    "DeepseekV2ForCausalLM": "V2",
    "FalconForCausalLM": "40B: groups, two norms",
    "GPT2LMHeadModel": "gpt2",
    "Gemma2ForCausalLM": "9b: windows in every other layer",
    "GemmaForCausalLM": "2b: one head of keys",
    "JambaForCausalLM": "mini",
    "MistralForCausalLM": "7B v0.1: a window",
    "MixtralForCausalLM": "all experts in one tensor, and a window",
    "Qwen2MoeForCausalLM": "A2.7B",
    "Qwen2VLForConditionalGeneration": "7B",
}
#: With another case, whose adapters come to more; and a model that has more than kernels of ours.
CAPTURED = CASES | {"MixtralForCausalLM": "8x7B: an expert a tensor", "MllamaForConditionalGeneration": "11B"}


def fixture_of(name: str, case: str, folder: Path) -> Fixture:
    if name not in registry.scan():
        pytest.skip("its plugin is not installed")
    proof = registry.find(name).load().proof
    assert proof is not None
    return Fixture(name, next(one for one in import_module(proof).CASES if one.name == case), folder)


def answers(fixture: Fixture, is_recorded: bool, counts: Sequence[int]) -> list[list[Answer]]:
    """For each number of rows, one engine after the other."""
    engine = fixture.engine(fixture.folder, dtype="bfloat16", block_size=4)
    runner = engine.executor.runner  # type: ignore[attr-defined]
    if not is_recorded:
        runner._replays = runner.ahead = None
    found = [fixture.answers(engine, fixture.samples[:count], logprobs=True) for count in counts]
    if is_recorded:
        assert runner._replays._steps
        assert all((step.recording is not None) == RECORDS for step in runner._replays._steps.values())
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_recorded_step_computes_the_same_numbers(name: str, tmp_path: Path) -> None:
    fixture = fixture_of(name, CASES[name], tmp_path)
    counts = (1, 4, 2)  # the recordings of one number serve other sequences, in other blocks
    for ours, plain in zip(answers(fixture, True, counts), answers(fixture, False, counts), strict=True):
        for recorded, wanted in zip(ours, plain, strict=True):
            assert recorded.tokens == wanted.tokens
            assert torch.equal(recorded.logprobs, wanted.logprobs)


#: What answers with a number, or with as many as the numbers say.
WAITS = {"__bool__", "__float__", "__index__", "__int__", "item", "masked_select", "nonzero", "tolist", "unique"}


class NeverWaiting(TorchFunctionMode):
    """Refuses what a GPU would be waited for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.__name__ not in WAITS, func.__name__
        if func.__name__ in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(one, torch.Tensor) and one.dtype is torch.bool for one in index), "rows by a mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "case"), CAPTURED.items())
def test_a_step_with_adapters_can_be_captured(
    name: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside every matrix and table, and where steps without any were captured before."""
    steps = 0

    def record(function: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, None]:
        nonlocal steps
        steps += 1
        with NeverWaiting():
            return function(), None

    fixture = fixture_of(name, case, tmp_path)
    every, _ = lora_checks._adapters(fixture)
    monkeypatch.setattr(Replays, "_recorder", lambda self: record)
    engine = fixture.engine(max_loras=2)
    engine.adapters.load("every", every.folder)
    fixture.answers(engine, fixture.samples[:2])
    assert steps
    before, steps = steps, 0
    fixture.answers(engine, fixture.samples[:2], lora=["every", None])
    assert 0 < steps <= before
