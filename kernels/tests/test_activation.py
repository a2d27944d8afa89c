"""Activations: the references against torch's and transformers' own, every C++ variant against the reference."""

import pytest
import torch
from torch.nn import functional

from bestiary_kernels import activation, gated_activation
from bestiary_kernels.activation import KINDS, _plain_operator, reference

from .cases import assert_rounds_to

DTYPES = [torch.float32, torch.bfloat16]


def test_reference_multiplies_torchs_silu_of_the_first_half() -> None:
    x = torch.randn(3, 10)
    assert torch.equal(reference.gated_activation(x), functional.silu(x[:, :5]) * x[:, 5:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (1, 1536), (3, 33), (17, 80), (40, 2050)])
def test_every_variant_agrees_with_the_reference(
    variant: str, kind: str, rows: int, width: int, dtype: torch.dtype
) -> None:
    x = (torch.randn(rows, 2 * width) * 4).to(dtype)
    assert_rounds_to(gated_activation(x, kind), reference.gated_activation(x, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_far_values_saturate_without_nan(variant: str, kind: str) -> None:
    gate = torch.tensor([-1e4, -200.0, -90.0, -30.0, 30.0, 90.0, 200.0, 1e4])
    x = torch.cat([gate, torch.ones(8)])[None]
    assert_rounds_to(gated_activation(x, kind), reference.gated_activation(x, kind))


def test_gelus_negative_tail_keeps_its_digits(variant: str) -> None:
    """1 + erf would cancel there, even in float64, hence the oracle with erfc."""
    gate = torch.linspace(-8, 8, 1001)
    expected = gate.double() * 0.5 * torch.special.erfc(-gate.double() * 0.5**0.5)
    y = gated_activation(torch.cat([gate, torch.ones(1001)])[None], "gelu")[0]
    torch.testing.assert_close(y, expected.float(), rtol=2e-5, atol=1e-20)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [0, 20])
def test_nan_reaches_the_output(variant: str, kind: str, place: int) -> None:
    x = torch.ones(1, 40)
    x[0, place] = float("nan")
    y = gated_activation(x, kind)
    assert y[0, place % 20].isnan() and int(y.isnan().sum()) == 1


def test_rows_may_be_strided(variant: str) -> None:
    x = torch.randn(5, 100)[:, 10:74]
    assert_rounds_to(gated_activation(x), reference.gated_activation(x))


def test_unknown_kind_and_odd_width_are_refused() -> None:
    with pytest.raises(ValueError, match="gelu_tanh"):
        gated_activation(torch.randn(2, 8), "swish")
    with pytest.raises(ValueError, match="two halves"):
        gated_activation(torch.randn(2, 7))


def test_other_layouts_fall_back_and_meta_has_its_shape() -> None:
    x = torch.randn(2, 3, 8)
    assert torch.equal(gated_activation(x), reference.gated_activation(x))
    assert gated_activation(torch.empty(3, 8, device="meta")).shape == (3, 4)


#: By our name, transformers'.
NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "quick_gelu": "quick_gelu",
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NAMES)
def test_plain_activations_are_transformers(kind: str, dtype: torch.dtype) -> None:
    oracle = pytest.importorskip("transformers.activations").ACT2FN[NAMES[kind]]
    x = (torch.randn(3, 2, 70) * 4).to(dtype)
    assert_rounds_to(activation(x, kind), oracle(x.double()).to(dtype))
    assert set(NAMES) == set(reference.ACTIVATIONS)


def test_an_unknown_plain_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="quick_gelu"):
        activation(torch.randn(2, 8), "swish")


def test_the_plain_operator_passes_torchs_checks() -> None:
    torch.library.opcheck(_plain_operator, (torch.randn(3, 8), "relu2"))
    assert activation(torch.empty(3, 8, device="meta"), "gelu").shape == (3, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 33), (2, 5, 80), (9, 2050)])
def test_every_variants_plain_activation_agrees_with_the_reference(
    variant: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = (torch.randn(shape) * 4).to(dtype)
    assert_rounds_to(activation(x, kind), reference.activation(x, kind))


@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
def test_nan_and_far_values_pass_a_plain_activation(variant: str, kind: str) -> None:
    x = torch.tensor([-1e4, -200.0, -90.0, -30.0, 30.0, 90.0, 200.0, 1e4, float("nan")])
    y = activation(x, kind)
    assert_rounds_to(y[:-1], reference.activation(x[:-1], kind))
    assert y[-1].isnan()


def test_rows_of_a_plain_activation_may_be_strided(variant: str) -> None:
    x = torch.randn(5, 100)[:, 10:74]
    assert_rounds_to(activation(x, "gelu"), reference.activation(x, "gelu"))
    assert_rounds_to(activation(x.T, "gelu"), reference.activation(x.T, "gelu"))
