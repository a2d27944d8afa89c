"""Experts in twelve bits: products and mixtures are those of the weights that went in, whoever else is in the batch."""

import pytest
import torch
from torch import Tensor

from bestiary_kernels import SqueezedExperts, Tape, experts_linear, moe, using
from bestiary_kernels.activation.reference import ACTIVATIONS
from bestiary_kernels.linear.squeezed import VARIABLE

from .cases import assert_rounds_to
from .conftest import NATIVE

pytestmark = [
    pytest.mark.skipif("avx2" not in NATIVE, reason="no kernel of ours reads squeezed weights here"),
    pytest.mark.usefixtures("squeezes_all"),
]

EXPERTS, WIDTH, INNER = 4, 192, 128
#: More than one pass over an expert's matrix takes, for each of them.
MANY = 500


def weight_of(outputs: int, inputs: int) -> Tensor:
    """Every so many of each expert's numbers are of exponents that no code stands for."""
    weight = torch.randn(EXPERTS, outputs, inputs) * inputs**-0.5
    weight[:, ::7, ::301] *= 1e-9
    return weight.bfloat16()


def held(*weights: Tensor) -> list[SqueezedExperts]:
    made = SqueezedExperts.of(*weights)
    if made is None:
        pytest.skip("oneDNN lays these shapes out in another way here")
    return made


def chosen_of(tokens: int, top_k: int) -> Tensor:
    return torch.rand(tokens, EXPERTS).topk(top_k).indices


@pytest.mark.parametrize("tokens", [0, 1, 9, 90, MANY])
@pytest.mark.parametrize("has_own_rows", [False, True])
def test_products_are_those_of_the_weights(tokens: int, has_own_rows: bool) -> None:
    weight = weight_of(INNER, WIDTH)
    (matrices,) = held(weight)
    assert matrices.shape == weight.shape and matrices.nbytes < weight.nbytes
    experts = chosen_of(tokens, 2)
    x = torch.randn(tokens, 2, WIDTH) if has_own_rows else torch.randn(tokens, WIDTH + 5)
    x = x.bfloat16()[..., :WIDTH]
    rows = x.double() if has_own_rows else x.double()[:, None].expand(-1, 2, -1)
    wanted = torch.einsum("tkoi,tki->tko", weight.double()[experts], rows)
    assert_rounds_to(experts_linear(x, matrices, experts), wanted.bfloat16(), steps=1.0, floor=1e-3)


@pytest.mark.parametrize("act", ["silu", "relu"])
@pytest.mark.parametrize("inner", [INNER, 96])
@pytest.mark.parametrize("tokens", [0, 1, 25, 140, MANY])
def test_a_mixture_is_that_of_the_weights(tokens: int, inner: int, act: str) -> None:
    matrices = weight_of(2 * inner, WIDTH), weight_of(WIDTH, inner)
    x, weights, experts = torch.randn(tokens, WIDTH).bfloat16(), torch.rand(tokens, 2), chosen_of(tokens, 2)
    gate_up, down = (weight.double() for weight in matrices)
    gate, up = torch.einsum("tkoi,ti->tko", gate_up[experts], x.double()).chunk(2, -1)
    said = torch.einsum("tkoi,tki->tko", down[experts], ACTIVATIONS[act](gate) * up)
    wanted = (said * weights.double()[..., None]).sum(1)
    made = held(*matrices)
    for backend in ("reference", *NATIVE):
        with using(backend):
            y = moe(x, *made, weights, experts, act)
        assert_rounds_to(y, wanted.bfloat16(), steps=2.0, floor=3e-2)


def test_a_token_comes_out_alike_in_any_company() -> None:
    """With 200 tokens an expert has some 100 rows; another kernel takes those, where AMX is."""
    gate_up, down = held(weight_of(2 * INNER, WIDTH), weight_of(WIDTH, INNER))
    x, weights, experts = torch.randn(200, WIDTH).bfloat16(), torch.rand(200, 2), chosen_of(200, 2)
    together = moe(x, gate_up, down, weights, experts)
    for some in (slice(0, 1), slice(3, 10), slice(50, 150)):
        assert torch.equal(moe(x[some], gate_up, down, weights[some], experts[some]), together[some])


def test_so_many_tokens_that_they_go_in_several_runs() -> None:
    gate_up, down = held(weight_of(2 * INNER, WIDTH), weight_of(WIDTH, INNER))
    tokens = 2 * 128 * 2**20 // (2 * 2 * (2 * WIDTH + INNER)) + 1
    x, weights = torch.randn(1000, WIDTH).bfloat16().repeat(-(-tokens // 1000), 1), torch.rand(1000, 2)
    experts, repeats = chosen_of(1000, 2), len(x) // 1000
    y = moe(x, gate_up, down, weights.repeat(repeats, 1), experts.repeat(repeats, 1))
    assert torch.equal(y, moe(x[:1000], gate_up, down, weights, experts).repeat(repeats, 1))
    made = experts_linear(x, gate_up, experts.repeat(repeats, 1))
    assert torch.equal(made, experts_linear(x[:1000], gate_up, experts).repeat(repeats, 1, 1))


def test_experts_that_nobody_chose_say_nothing() -> None:
    weight = weight_of(INNER, WIDTH)
    x, experts = torch.randn(3, WIDTH).bfloat16(), torch.tensor([[0], [2], [0]])
    (before,) = held(weight)
    weight[1, 0, 0] = float("nan")
    (after,) = held(weight)
    assert torch.equal(after(x, experts), before(x, experts))
    assert after(x, torch.ones_like(experts)).isnan().any()


@pytest.mark.parametrize("expert", [-1, EXPERTS])
def test_an_expert_outside_the_weights_is_refused(expert: int) -> None:
    gate_up, down = held(weight_of(2 * INNER, WIDTH), weight_of(WIDTH, INNER))
    for tokens in (1, MANY):
        x, experts = torch.randn(tokens, WIDTH).bfloat16(), torch.full((tokens, 1), expert)
        with pytest.raises(IndexError, match="outside the weights"):
            moe(x, gate_up, down, torch.ones(tokens, 1), experts)
        with pytest.raises(IndexError, match="outside the weights"):
            experts_linear(x, gate_up, experts)


def test_what_does_not_fit_is_refused() -> None:
    plain = weight_of(2 * INNER, WIDTH), weight_of(WIDTH, INNER)
    gate_up, _ = held(*plain)
    x, weights, experts = torch.randn(2, WIDTH).bfloat16(), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="squeezed and the other is not"):
        moe(x, gate_up, plain[1], weights, experts)
    with pytest.raises(ValueError, match="do not fit"):
        moe(x, gate_up, gate_up, weights, experts)
    with pytest.raises(ValueError, match="do not fit"):
        experts_linear(x.float(), gate_up, experts)
    with pytest.raises(ValueError, match="do not fit"):
        experts_linear(x[:, :-1], gate_up, experts)


def test_all_are_squeezed_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of(INNER, WIDTH)
    strange = weight.clone()
    every = torch.arange(INNER * WIDTH, dtype=torch.int32).to(torch.int16)
    strange[-1] = every.view(torch.bfloat16).view(INNER, WIDTH)
    assert SqueezedExperts.of(weight, strange) is None
    assert SqueezedExperts.of(weight.float()) is None
    monkeypatch.setenv(VARIABLE, "0")
    assert SqueezedExperts.of(weight) is None


def test_a_step_with_them_is_recorded() -> None:
    gate_up, down = held(weight_of(2 * INNER, WIDTH), weight_of(WIDTH, INNER))
    x, weights, experts = torch.randn(5, WIDTH).bfloat16(), torch.rand(5, 2), chosen_of(5, 2)

    def step() -> tuple[Tensor, Tensor]:
        return moe(x, gate_up, down, weights, experts), experts_linear(x, gate_up, experts)

    _, tape = Tape.record(step)
    assert tape is not None
    x.copy_(torch.randn(5, WIDTH))
    weights.copy_(torch.rand(5, 2))
    experts.copy_(chosen_of(5, 2))
    for replayed, wanted in zip(tape.replay(), step(), strict=True):
        assert torch.equal(replayed, wanted)
