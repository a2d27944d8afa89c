"""Recorded decode steps of models with experts, latent rows, windows and caps: the same numbers as unrecorded ones."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest
import torch

import bestiary_kernels as kernels
from bestiary import registry
from bestiary.testing.fixture import Answer, Fixture

pytest.importorskip("transformers")

#: Where matrices of bfloat16 are kernels of ours, a step is recorded; elsewhere it must run as well, unrecorded.
RECORDS = kernels.status().backend == "avx512_bf16"
#: By the name of the case. With a window prompts reach it, and answers go on beyond it.
CASES = {
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
}


def answers(fixture: Fixture, is_recorded: bool, counts: Sequence[int]) -> list[list[Answer]]:
    """For each number of rows, one engine after the other."""
    engine = fixture.engine(fixture.folder, dtype="bfloat16", block_size=4)
    runner = engine.executor.runner  # type: ignore[attr-defined]
    if not is_recorded:
        runner._replays = None
    found = [fixture.answers(engine, fixture.samples[:count], logprobs=True) for count in counts]
    if is_recorded:
        assert runner._replays._steps
        assert all((recording is not None) == RECORDS for _, recording in runner._replays._steps.values())
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_recorded_step_computes_the_same_numbers(name: str, tmp_path: Path) -> None:
    if name not in registry.scan():
        pytest.skip("its plugin is not installed")
    proof = registry.find(name).load().proof
    assert proof is not None
    (case,) = (case for case in import_module(proof).CASES if case.name == CASES[name])
    fixture = Fixture(name, case, tmp_path)
    counts = (1, 4, 2)  # the recordings of one number serve other sequences, in other blocks
    for ours, plain in zip(answers(fixture, True, counts), answers(fixture, False, counts), strict=True):
        for recorded, wanted in zip(ours, plain, strict=True):
            assert recorded.tokens == wanted.tokens
            assert torch.equal(recorded.logprobs, wanted.logprobs)
