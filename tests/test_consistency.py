"""The real model against transformers: the same greedy tokens whatever the company, the cut and the cache.

The oracle reads our whole answer at once and says at every position which token it would have chosen. If all agree,
its own greedy decoding gives the same text, by induction over the positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from bestiary import LLM, RequestOutput, SamplingParams

pytestmark = pytest.mark.real
ONE_AT_A_TIME, TOGETHER = pytest.mark.xdist_group("real one at a time"), pytest.mark.xdist_group("real")

NEW_TOKENS = 64
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
TOPICS = (
    "the sea", "bread", "a lighthouse", "an orchard", "two brothers", "the number seven", "an old clock",
    "rain in Lima", "photosynthesis", "a train to Kraków", "how magnets work", "the first violin", "snow leopards",
    "tax law", "prime numbers", "a recipe for soup",
)  # fmt: skip
OPENINGS = (
    "Tell me about {}.",
    "Once upon a time there was {}, and",
    "def f(x):\n    # {}\n    return",
    "<|im_start|>user\nWrite one sentence on {}.<|im_end|>\n<|im_start|>assistant\n",
)
PROMPTS = [opening.format(topic) for topic in TOPICS for opening in OPENINGS]


@dataclass
class Verdict:
    """What the oracle says of one answer: its own choice at each place, and by how much it preferred it."""

    choices: list[int]
    margins: list[float]


class Oracle:
    """transformers' Llama, asked once for each answer."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.judge = cache(self._judge)

    def _judge(self, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Verdict:
        with torch.inference_mode():
            logits = self._model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].float()
        top = logits.topk(2, dim=-1)
        return Verdict(top.indices[:, 0].tolist(), (top.values[:, 0] - top.values[:, 1]).tolist())

    def generate(self, prompt: list[int]) -> list[int]:
        self._model.generation_config.eos_token_id = None  # as ignore_eos
        tokens = self._model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
        return list(tokens[0, len(prompt) :].tolist())


@pytest.fixture(scope="module")
def oracle(demo: Path) -> Oracle:
    return Oracle(demo, torch.float32)


def serve(folder: Path, prompts: list[str], **settings: Any) -> list[RequestOutput]:
    llm = LLM(model=str(folder), **{"dtype": "float32", "max_num_seqs": 64, "max_model_len": 512, **settings})
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    llm.engine.check_integrity()
    assert llm.engine.scheduler.cache.is_empty
    llm.close()
    return outputs


def disagreements(oracle: Oracle, outputs: list[RequestOutput]) -> Iterator[str]:
    for output in outputs:
        answer = tuple(output.outputs[0].token_ids)
        assert len(answer) == NEW_TOKENS
        verdict = oracle.judge(tuple(output.prompt_token_ids), answer)
        for place, (ours, theirs, margin) in enumerate(zip(answer, verdict.choices, verdict.margins, strict=True)):
            if ours != theirs:
                yield f"{output.prompt!r}: token {place} is {ours}, the reference's {theirs} by {margin:.6f}"


@TOGETHER
def test_the_oracle_by_induction_is_the_references_own_generate(demo: Path, oracle: Oracle) -> None:
    for output in serve(demo, PROMPTS[:3]):
        assert oracle.generate(output.prompt_token_ids) == output.outputs[0].token_ids


@pytest.fixture(scope="module")
def together(demo: Path) -> list[RequestOutput]:
    """The answers of batch 64 in chunks of 512."""
    return serve(demo, PROMPTS, enable_prefix_caching=False, max_num_batched_tokens=512)


@TOGETHER
def test_batch_64_in_chunks_of_512_is_the_reference(oracle: Oracle, together: list[RequestOutput]) -> None:
    assert list(disagreements(oracle, together)) == []


@TOGETHER
def test_batch_64_in_chunks_of_7_beside_decode_is_the_reference(demo: Path, oracle: Oracle) -> None:
    outputs = serve(demo, PROMPTS, enable_prefix_caching=False, max_num_batched_tokens=64 + 7)
    assert list(disagreements(oracle, outputs)) == []


@ONE_AT_A_TIME
def test_batch_1_in_chunks_of_512_is_the_reference(demo: Path, oracle: Oracle) -> None:
    outputs = serve(demo, PROMPTS, enable_prefix_caching=False, max_num_seqs=1, max_num_batched_tokens=512)
    assert list(disagreements(oracle, outputs)) == []


@TOGETHER
def test_batch_1_in_chunks_of_7_is_the_reference(demo: Path, oracle: Oracle, together: list[RequestOutput]) -> None:
    """Most of the known answer is read as prompt, seven tokens a step, and a choice is asked of each."""
    known = [list(output.outputs[0].token_ids) for output in together]
    llm = LLM(model=str(demo), dtype="float32", max_num_seqs=1, max_num_batched_tokens=7, max_model_len=512)
    read = NEW_TOKENS - 8
    prompts = [
        {"prompt_token_ids": output.prompt_token_ids + answer[:read]}
        for output, answer in zip(together, known, strict=True)
    ]
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS - read, ignore_eos=True, prompt_logprobs=1)
    for first, answer, output in zip(together, known, llm.generate(prompts, params, use_tqdm=False), strict=True):
        read_as_prompt = output.prompt_logprobs[len(first.prompt_token_ids) :] if output.prompt_logprobs else []
        choices = [token for found in read_as_prompt if found for token, at in found.items() if at.rank == 1]
        choices += output.outputs[0].token_ids
        verdict = oracle.judge(tuple(first.prompt_token_ids), tuple(answer))
        assert choices == verdict.choices, output.prompt_token_ids


@TOGETHER
def test_prefix_hits_change_no_token(demo: Path, oracle: Oracle) -> None:
    """The second round finds nearly every prompt and answer block of the first; so do continued answers."""
    llm = LLM(model=str(demo), dtype="float32", max_num_seqs=64, max_model_len=512, block_size=4)
    first = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    second = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert all(output.num_cached_tokens >= len(output.prompt_token_ids) - 4 for output in second)
    assert list(disagreements(oracle, first)) == []
    assert [o.outputs[0].token_ids for o in second] == [o.outputs[0].token_ids for o in first]
    longer = [{"prompt_token_ids": o.prompt_token_ids + list(o.outputs[0].token_ids)[:40]} for o in first]
    third = llm.generate(longer, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True), use_tqdm=False)
    assert all(output.num_cached_tokens >= len(output.prompt_token_ids) - 4 for output in third)
    assert [o.outputs[0].token_ids for o in third] == [list(o.outputs[0].token_ids)[40:] for o in first]


@TOGETHER
@pytest.mark.parametrize("share", [True, False], ids=["blocks found again", "all computed again"])
def test_forced_preemption_changes_no_token(share: bool, demo: Path, oracle: Oracle) -> None:
    """A cache for a third of what the batch needs: sequences yield their blocks over and over."""
    llm = LLM(
        model=str(demo),
        dtype="float32",
        max_num_seqs=64,
        max_model_len=128,
        num_gpu_blocks_override=120,
        enable_prefix_caching=share,
    )
    preempted = 0
    yielding = llm.engine.scheduler.preempt

    def count(sequence: Any) -> None:
        nonlocal preempted
        preempted += 1
        yielding(sequence)

    llm.engine.scheduler.preempt = count  # type: ignore[method-assign]
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert preempted > 10
    assert list(disagreements(oracle, outputs)) == []
    llm.engine.check_integrity()


#: A logit of about 20 is rounded in steps of 1/8 in bfloat16; thirty layers of rounding move it by a few of them.
BF16_NOISE = 0.5


@TOGETHER
def test_in_bfloat16_the_choice_is_the_references_wherever_its_margin_is_no_noise(demo: Path) -> None:
    oracle = Oracle(demo, torch.bfloat16)
    judged = 0
    for output in serve(demo, PROMPTS, dtype="bfloat16"):
        answer = tuple(output.outputs[0].token_ids)
        verdict = oracle.judge(tuple(output.prompt_token_ids), answer)
        for ours, theirs, margin in zip(answer, verdict.choices, verdict.margins, strict=True):
            if margin > BF16_NOISE:
                judged += 1
                assert ours == theirs, f"{output.prompt!r}: {ours} instead of {theirs}, preferred by {margin}"
    assert judged > 0.6 * len(PROMPTS) * NEW_TOKENS
