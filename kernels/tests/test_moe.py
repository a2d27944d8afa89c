"""route, moe and experts_linear: against transformers' Mixtral and DeepSeek-V2 and against a loop over tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bestiary_kernels import Tape, experts_linear, gated_activation, gpu, library, moe, route
from bestiary_kernels.activation.reference import ACTIVATIONS
from bestiary_kernels.moe import _operator, _route_operator
from bestiary_kernels.moe.linear import _operator as _linear_operator

from .cases import assert_rounds_to
from .grid.interpreter import interpreted

DTYPES = [torch.float32, torch.bfloat16]


def weights_of(experts: int, width: int, inner: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    gate_up, down = torch.randn(experts, 2 * inner, width), torch.randn(experts, width, inner)
    return (gate_up * width**-0.5).to(dtype), (down * inner**-0.5).to(dtype)


@pytest.fixture(scope="module")
def mixtral() -> Any:
    """transformers' block of 8 experts, 2 of them for each token."""
    module = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = module.MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=8, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    block = module.MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return block.requires_grad_(False).eval()


def test_route_is_mixtrals_router(mixtral: Any) -> None:
    logits, scores, indices = mixtral.gate(torch.randn(40, 32))
    weights, experts = route(logits, 2, renormalise=True)
    assert torch.equal(experts, indices)
    torch.testing.assert_close(weights, scores)
    assert weights.dtype is torch.float32 and experts.dtype is torch.int64


def test_route_and_moe_are_mixtrals_block_in_float32(mixtral: Any) -> None:
    x = torch.randn(40, 32)
    chosen = route(x @ mixtral.gate.weight.T, 2, renormalise=True)
    y = moe(x, mixtral.experts.gate_up_proj, mixtral.experts.down_proj, *chosen)
    torch.testing.assert_close(y, mixtral(x[None])[0])


@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 2), (4, 4), (8, 1)])
def test_route_is_deepseeks_group_limited_router(groups: int, top_groups: int) -> None:
    module = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2")
    config = module.DeepseekV2Config(
        hidden_size=32,
        n_routed_experts=16,
        num_experts_per_tok=2,
        n_group=groups,
        topk_group=top_groups,
        topk_method="group_limited_greedy",
        routed_scaling_factor=16.0,
    )
    router = module.DeepseekV2TopkRouter(config)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(60, 32)
    logits, expected_weights, expected_experts = router(x[None])
    weights, experts = route(
        logits.flatten(0, -2), 2, renormalise=False, scale=16.0, groups=groups, top_groups=top_groups
    )
    weights_TE, expected_TE = (
        torch.zeros(60, 16).scatter_(1, chosen.view(60, 2), weight.view(60, 2).float())
        for weight, chosen in ((weights, experts), (expected_weights, expected_experts))
    )
    torch.testing.assert_close(weights_TE, expected_TE)


@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 2), (8, 4)])
def test_route_is_deepseek_v3s_router_with_a_correction_bias(groups: int, top_groups: int) -> None:
    module = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = module.DeepseekV3Config(
        hidden_size=32,
        n_routed_experts=32,
        num_experts_per_tok=4,
        n_group=groups,
        topk_group=top_groups,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    router = module.DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(router.weight, std=0.3)
    torch.nn.init.normal_(router.e_score_correction_bias, std=0.2)
    logits, expected_weights, expected_experts = router(torch.randn(60, 32))
    weights, experts = route(
        logits,
        4,
        renormalise=True,
        scale=2.5,
        groups=groups,
        top_groups=top_groups,
        scoring="sigmoid",
        bias_E=router.e_score_correction_bias,
        group_by="best_two",
    )
    weights_TE, expected_TE = (
        torch.zeros(60, 32).scatter_(1, chosen, weight)
        for weight, chosen in ((weights, experts), (expected_weights, expected_experts))
    )
    torch.testing.assert_close(weights_TE, expected_TE)


@pytest.mark.parametrize("jitter", [0.01, 0.2])
def test_route_is_phimoes_sparsemixer(jitter: float) -> None:
    module = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    logits = torch.cat((torch.randn(60, 16), torch.randn(20, 16) - 6))
    logits[:20, 3] = logits[:20].amax(-1) * 0.99  # near the best, on either side of the smaller threshold
    expected_weights, expected_experts = module.sparsemixer(logits, jitter, training=False)
    weights, experts = route(logits, 2, renormalise=False, scoring="sparsemixer", jitter=jitter)
    assert torch.equal(experts, expected_experts)
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize("backend", ["reference", *library.status().available[1:], "triton"])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sparsemixer"])
def test_of_equal_experts_the_first_is_chosen_and_nan_chooses_different_ones(backend: str, scoring: str) -> None:
    if backend == "triton" and not gpu.is_installed():
        pytest.skip("Triton is not installed")
    logits = torch.tensor([[1.0, 2, 2, 0, 2, 1, 1], [float("nan")] * 7, [0.0] * 7])
    with interpreted() if backend == "triton" else library.using(backend):
        weights, experts = route(logits, 4, renormalise=False, scoring=scoring)
    assert experts[0].tolist() == [1, 2, 4, 0] and experts[2].tolist() == [0, 1, 2, 3]
    assert len(set(experts[1].tolist())) == 4 and set(experts[1].tolist()) <= set(range(7))
    assert weights[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", *library.status().available[1:], "triton"])
def test_two_equal_experts_are_the_best_two_of_their_group(backend: str) -> None:
    if backend == "triton" and not gpu.is_installed():
        pytest.skip("Triton is not installed")
    logits = torch.tensor([[1.0, -9, 1, 1.5, -9, 0]])
    with interpreted() if backend == "triton" else library.using(backend):
        _, experts = route(logits, 2, renormalise=False, scoring="sigmoid", groups=2, top_groups=1, group_by="best_two")
    assert experts.tolist() == [[0, 2]]


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_token_gets_its_best_experts_in_order(dtype: torch.dtype, renormalise: bool) -> None:
    logits = (torch.randn(30, 12) * 3).to(dtype)
    weights, experts = route(logits, 5, renormalise=renormalise, scale=2.5)
    for row in range(30):
        parts = logits[row].double().exp() / logits[row].double().exp().sum()
        best = sorted(range(12), key=lambda e: (-float(logits[row, e]), e))[:5]
        total = float(parts[best].sum()) if renormalise else 1.0
        torch.testing.assert_close(weights[row], (2.5 * parts[best] / total).float())
        torch.testing.assert_close(logits[row, experts[row]], logits[row, best])


def test_softmax_over_the_chosen_alone_ignores_all_others() -> None:
    logits = torch.randn(30, 12) * 3
    weights, experts = route(logits, 3, renormalise=False, softmax_last=True)
    torch.testing.assert_close(weights, logits.gather(1, experts).softmax(-1))
    torch.testing.assert_close(weights, route(logits, 3, renormalise=True)[0])
    grouped, chosen = route(logits - 100, 3, renormalise=False, softmax_last=True, groups=4, top_groups=1)
    assert (chosen // 3 == logits.argmax(-1, keepdim=True) // 3).all()
    torch.testing.assert_close(grouped.sum(-1), torch.ones(30))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("tokens", [0, 1, 25])
def test_moe_is_the_weighted_sum_of_the_chosen_experts(tokens: int, act: str, dtype: torch.dtype) -> None:
    gate_up, down = weights_of(6, 20, 12, dtype)
    x = torch.randn(tokens, 20).to(dtype)
    weights, experts = torch.rand(tokens, 3), torch.rand(tokens, 6).topk(3).indices
    y = moe(x, gate_up, down, weights, experts, act)
    expected = torch.zeros(tokens, 20, dtype=torch.float64)
    for row in range(tokens):
        for weight, expert in zip(weights[row], experts[row], strict=True):
            gate, up = (gate_up[expert].double() @ x[row].double()).chunk(2)
            expected[row] += weight.double() * (down[expert].double() @ (ACTIVATIONS[act](gate) * up))
    assert_rounds_to(y, expected.to(dtype), steps=2.0, floor=2e-5 if dtype is torch.float32 else 2e-2)


def test_experts_that_nobody_chose_are_not_read() -> None:
    gate_up, down = weights_of(4, 8, 6)
    x, weights, experts = torch.randn(3, 8), torch.ones(3, 1), torch.tensor([[0], [2], [0]])
    before = moe(x, gate_up, down, weights, experts)
    gate_up[[1, 3]], down[[1, 3]] = float("nan"), float("nan")
    assert torch.equal(moe(x, gate_up, down, weights, experts), before)


@pytest.mark.parametrize("expert", [-1, 4])
def test_an_expert_outside_the_weights_is_refused(expert: int) -> None:
    with pytest.raises(IndexError, match="outside the weights"):
        moe(torch.randn(1, 8), *weights_of(4, 8, 6), torch.ones(1, 1), torch.tensor([[expert]]))


@pytest.mark.parametrize("expert", [-1, 4])
def test_a_product_refuses_an_expert_outside_the_weights(expert: int) -> None:
    with pytest.raises(IndexError, match="outside the weights"):
        experts_linear(torch.randn(1, 8), torch.randn(4, 3, 8), torch.tensor([[expert]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mixture_is_its_products_one_by_one(dtype: torch.dtype) -> None:
    gate_up, down = weights_of(6, 20, 12, dtype)
    x, experts = torch.randn(9, 20).to(dtype), torch.rand(9, 6).topk(3).indices
    weights = torch.rand(9, 3)
    hidden = gated_activation(experts_linear(x, gate_up, experts), "silu")
    said = experts_linear(hidden, down, experts).float()
    assert_rounds_to((said * weights[..., None]).sum(1).to(dtype), moe(x, gate_up, down, weights, experts))


@pytest.mark.skipif(not gpu.is_installed(), reason="Triton is not installed")
def test_on_a_gpu_an_expert_outside_the_weights_says_nothing() -> None:
    gate_up, down = weights_of(4, 24, 6)
    x, weights = torch.randn(3, 24), torch.rand(3, 2)
    experts = torch.tensor([[0, 4], [-1, 3], [2**40, -(2**40)]])
    inside = (experts >= 0) & (experts < 4)
    with interpreted():
        y = moe(x, gate_up, down, weights, experts)
    correct = moe(x, gate_up, down, weights * inside, experts.where(inside, 0))
    assert_rounds_to(y, correct)
    assert torch.equal(y[2], torch.zeros(24))


@pytest.mark.skipif(not gpu.is_installed(), reason="Triton is not installed")
def test_on_a_gpu_more_choices_than_are_counted_at_a_time_find_their_experts() -> None:
    gate_up, down = weights_of(5, 1030, 2)
    x, experts = torch.randn(400, 1030), torch.rand(400, 5).topk(3).indices
    weights = torch.rand(400, 3)
    with interpreted():
        y = moe(x, gate_up, down, weights, experts)
    with library.using("reference"):
        assert_rounds_to(y, moe(x, gate_up, down, weights, experts), floor=1e-4)


@pytest.mark.skipif(library.active() is None, reason="no C++ library is in use")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_replay_follows_the_router(dtype: torch.dtype) -> None:
    gate_up, down = weights_of(8, 32, 16, dtype)
    logits, x = torch.randn(5, 8).to(dtype), torch.randn(5, 32).to(dtype)

    def step() -> Tensor:
        return moe(x, gate_up, down, *route(logits, 2, renormalise=True, scoring="sigmoid"))

    _, tape = Tape.record(step)
    assert tape is not None
    for _ in range(3):
        logits.copy_(torch.randn(5, 8))
        assert torch.equal(tape.replay().clone(), step())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_work_that_threads_share_loses_nothing(variant: str, threads: int) -> None:
    gate_up, down = weights_of(6, 200, 90)
    x, chosen = torch.randn(21, 200), route(torch.randn(21, 6), 2, renormalise=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = moe(x, gate_up, down, *chosen)
    finally:
        torch.set_num_threads(before)
    with library.using("reference"):
        torch.testing.assert_close(y, moe(x, gate_up, down, *chosen), rtol=1e-5, atol=1e-5)


def test_numbers_and_shapes_that_do_not_fit_are_refused() -> None:
    logits = torch.randn(2, 8)
    too_many = ({"groups": 4, "top_groups": 5}, {"groups": 4, "top_k": 3})
    for wrong in ({"top_k": 9}, {"top_k": 0}, {"groups": 3}, {"groups": 0}, *too_many):
        with pytest.raises(ValueError, match="route"):
            route(logits, **{"top_k": 2, "renormalise": True, **wrong})
    for unfit in (
        {"scoring": "entmax"},
        {"group_by": "worst"},
        {"softmax_last": True, "scoring": "sigmoid"},
        {"scoring": "sparsemixer", "groups": 2},
        {"scoring": "sparsemixer", "bias_E": torch.zeros(8)},
        {"bias_E": torch.zeros(7)},
        {"groups": 8, "top_groups": 4, "group_by": "best_two"},
    ):
        with pytest.raises(ValueError, match="route"):
            route(logits, 2, renormalise=True, **unfit)
    gate_up, down = weights_of(4, 8, 6)
    chosen = torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="moe: the shapes"):
        moe(torch.randn(3, 7), gate_up, down, *chosen)
    with pytest.raises(ValueError, match="moe: the shapes"):
        moe(torch.randn(2, 8), gate_up, down, *chosen)
    with pytest.raises(ValueError, match="moe: the shapes"):
        moe(torch.randn(3, 8).bfloat16(), gate_up, down, *chosen)
    for x in (torch.randn(3, 7), torch.randn(2, 8), torch.randn(3, 2, 7), torch.randn(3, 8).bfloat16()):
        with pytest.raises(ValueError, match="experts_linear: the shapes"):
            experts_linear(x, gate_up, chosen[1])
    with pytest.raises(ValueError, match="'swish' is unknown"):
        moe(torch.randn(3, 8), gate_up, down, *chosen, "swish")


def test_the_operators_pass_torchs_checks() -> None:
    logits = torch.randn(5, 8)
    torch.library.opcheck(_route_operator, (logits, 2, True, 1.0, 4, 2, False))
    of_v3 = (logits, 2, True, 1.0, 4, 2, False, "sigmoid", torch.randn(8), "best_two", 0.0)
    torch.library.opcheck(_route_operator, of_v3)
    chosen = route(logits, 2, renormalise=True)
    torch.library.opcheck(_operator, (torch.randn(5, 6), *weights_of(8, 6, 4), *chosen, "silu"))
    for x in (torch.randn(5, 6), torch.randn(5, 2, 6)):
        torch.library.opcheck(_linear_operator, (x, torch.randn(8, 4, 6), chosen[1]))
    meta = torch.empty(5, 8, device="meta")
    weights, experts = route(meta, 2, renormalise=True)
    assert weights.shape == experts.shape == (5, 2) and experts.dtype is torch.int64
    assert experts_linear(meta, torch.empty(8, 3, 8, device="meta"), experts).shape == (5, 2, 3)
