"""The meter behind `bestiary bench`: what steps are made of, read and compute, against sums made by other means."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bestiary.blocks import Attention, Decoder, Embedding, GatedMLP, Head, Layer, Layers, RMSNorm
from bestiary.checkpoint import ConfigFile
from bestiary.cli.meter import Costs, Limits, Meter, Phase
from bestiary.config import EngineConfig
from bestiary.engine import Engine
from bestiary.parallel import Mesh
from bestiary.planner import Shapes, rank_of
from bestiary.sampling.params import SamplingParams
from bestiary.testing import FakeExecutor

WIDTH, INNER, VOCABULARY, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 24, 40, 50, 6, 2, 8, 3

MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "torch_dtype": "bfloat16",
}


def tree(*, tied: bool) -> Decoder:
    def layer(_: int) -> Layer:
        mixer = Attention(WIDTH, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, rope=None)
        return Layer(
            mix_norm=RMSNorm(WIDTH, 1e-5), mixer=mixer, ffn_norm=RMSNorm(WIDTH, 1e-5), ffn=GatedMLP(WIDTH, INNER)
        )

    return Decoder(
        embed=Embedding(VOCABULARY, WIDTH),
        layers=Layers(LAYERS, layer),
        norm=RMSNorm(WIDTH, 1e-5),
        head=Head(VOCABULARY, WIDTH, tied=tied),
        context=64,
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_every_weight_but_an_embedding_that_is_only_looked_up_in(tied: bool) -> None:
    costs = Costs.of(tree(tied=tied), rank_of(tree(tied=tied), Mesh(), torch.bfloat16))
    attention = WIDTH * (HEADS + 2 * KV_HEADS) * HEAD_DIM + HEADS * HEAD_DIM * WIDTH
    body = LAYERS * (attention + 3 * WIDTH * INNER + 2 * WIDTH) + WIDTH
    looked_up = 0 if tied else 2 * WIDTH
    assert costs.weights_read(3) == 2 * (body + VOCABULARY * WIDTH) + 3 * looked_up
    assert (costs.body_parameters, costs.head_parameters) == (body, VOCABULARY * WIDTH)
    assert costs.kv_bytes == 2 * LAYERS * KV_HEADS * 2 * HEAD_DIM
    assert costs.attention_flops == LAYERS * HEADS * 4 * HEAD_DIM


def test_a_step_reads_and_computes_with_the_experts_that_its_tokens_choose() -> None:
    shapes = Shapes(ConfigFile(dict(MIXTRAL), Path("config.json")), EngineConfig(model="m"))
    costs = Costs.of(shapes.tree, shapes.rank(Mesh()))
    experts, expert = MIXTRAL["num_local_experts"], 3 * WIDTH * INNER * LAYERS
    assert costs.weights_read(10**6) - costs.weights_read(10**6 - 1) == 2 * WIDTH  # all chosen: a row of the table more
    others = costs.weights_read(1) - 2 * 2 * expert
    assert costs.weights_read(2) == pytest.approx(
        others + 2 * WIDTH + 2 * expert * experts * (1 - (1 - 2 / experts) ** 2)
    )
    assert costs.body_parameters == others / 2 - VOCABULARY * WIDTH - WIDTH + 2 * expert


@pytest.mark.parametrize("budget", [7, 16, 2048])
def test_the_work_adds_up_however_it_is_cut_into_steps(budget: int) -> None:
    """Each token but the last runs once, and sees itself and those before it; each answer token needs logits."""
    costs = Costs(
        weights_read=lambda tokens: 1000, body_parameters=11, head_parameters=7, kv_bytes=3, attention_flops=5
    )
    meter = Meter(FakeExecutor(64, 4), costs)
    engine = Engine(EngineConfig(model="fake", max_num_batched_tokens=budget), meter)
    requests = [(3, 5), (13, 1), (20, 9), (1, 2)]
    meter.start()
    for number, (prompt, answer) in enumerate(requests):
        params = SamplingParams(max_tokens=answer, temperature=0, detokenize=False)
        engine.add_request(str(number), [number * 40 + i for i in range(prompt)], params)
    while engine.has_unfinished_requests():
        engine.step()
    num_run = [prompt + answer - 1 for prompt, answer in requests]
    pairs = sum(position for n in num_run for position in range(1, n + 1))
    assert sum(step.num_tokens for step in meter.steps) == sum(num_run)
    assert sum(step.num_first for step in meter.steps) == len(requests)
    assert sum(step.num_flops for step in meter.steps) == (
        2 * 11 * sum(num_run) + 2 * 7 * sum(answer for _, answer in requests) + 5 * pairs
    )
    kinds: Sequence[str] = [step.kind for step in meter.steps]
    assert kinds[0] == "prefill"
    assert kinds[-1] == "decode"
    assert ("mixed" in kinds) == (budget < 37)


def test_a_decode_step_reads_the_weights_and_all_that_is_cached() -> None:
    costs = Costs(weights_read=lambda tokens: 1000, body_parameters=0, head_parameters=0, kv_bytes=3, attention_flops=0)
    meter = Meter(FakeExecutor(64, 4), costs)
    engine = Engine(EngineConfig(model="fake"), meter)
    for number, prompt in enumerate((5, 9)):
        engine.add_request(str(number), [*range(prompt)], SamplingParams(max_tokens=3, temperature=0, detokenize=False))
    while engine.has_unfinished_requests():
        engine.step()
    assert [(step.kind, step.num_bytes) for step in meter.steps] == [
        ("prefill", 1000 + 3 * (5 + 9)),
        ("decode", 1000 + 3 * (6 + 10)),
        ("decode", 1000 + 3 * (7 + 11)),
    ]
    seconds = sum(step.seconds for step in meter.steps[1:])
    phase = Phase.of(meter.steps, "decode", Limits(read_bytes=1e6, flops=1e9))
    assert phase is not None
    assert phase.bandwidth_share == pytest.approx((2000 + 3 * 34) / seconds / 1e6)
    assert (phase.num_steps, phase.num_tokens) == (2, 4)
    assert Phase.of(meter.steps, "mixed", Limits(None, 1.0)) is None
