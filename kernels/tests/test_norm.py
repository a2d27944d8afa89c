"""The norms: the references against torch's own, every C++ variant against the reference."""

import pytest
import torch
from torch.nn import functional

from bestiary_kernels import add_layer_norm, add_rms_norm, using
from bestiary_kernels.norm import _layer_operator, reference

from .cases import assert_rounds_to

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_torchs_rms_norm_of_the_sum(dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(5, 48).to(dtype) for _ in range(3))
    y, h = reference.add_rms_norm(x, residual, weight[0], 1e-5)
    assert torch.equal(h, x + residual)
    assert_rounds_to(y, functional.rms_norm(h.float(), (48,), weight[0].float(), 1e-5).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 80, 576])
@pytest.mark.parametrize("rows", [0, 1, 3, 17, 130])
def test_every_variant_agrees_with_the_reference(variant: str, rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    for given in (None, residual):
        expected_y, expected_h = reference.add_rms_norm(x, given, weight, 1e-5, 1.0)
        y, h = add_rms_norm(x, None if given is None else given.clone(), weight, 1e-5, 1.0)
        assert_rounds_to(y, expected_y)
        assert torch.equal(h, expected_h)
        assert (h is x) == (given is None)


def test_large_input_takes_the_parallel_path(variant: str) -> None:
    x, weight = torch.randn(300, 640), torch.randn(640)
    assert_rounds_to(add_rms_norm(x, None, weight, 1e-6)[0], reference.add_rms_norm(x, None, weight, 1e-6)[0])


def test_heads_of_a_fused_buffer_are_normed_where_they_lie(variant: str) -> None:
    fused, weight = torch.randn(5, 10 * 32), torch.randn(32)
    heads = fused[:, 64:256].view(5, 6, 32)
    assert_rounds_to(add_rms_norm(heads, None, weight, 1e-6)[0], reference.add_rms_norm(heads, None, weight, 1e-6)[0])


def test_the_residual_buffer_becomes_the_sum(variant: str) -> None:
    x, residual, weight = torch.randn(3, 16), torch.randn(3, 16), torch.ones(16)
    _, h = add_rms_norm(x, residual, weight, 1e-6)
    assert h is residual


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_reach_the_output(variant: str, dtype: torch.dtype, value: float) -> None:
    x = torch.ones(2, 40, dtype=dtype)
    x[1, 37] = value
    y, _ = add_rms_norm(x, None, torch.ones(40, dtype=dtype), 1e-6)
    assert y[0].isfinite().all()
    assert torch.equal(y[1].isnan(), reference.add_rms_norm(x, None, torch.ones(40, dtype=dtype), 1e-6)[0][1].isnan())


def test_unknown_dtypes_and_layouts_fall_back() -> None:
    x = torch.randn(4, 6, dtype=torch.float64).T
    assert torch.equal(
        add_rms_norm(x, None, torch.ones(4), 1e-6)[0], reference.add_rms_norm(x, None, torch.ones(4), 1e-6)[0]
    )


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="width 8"):
        add_rms_norm(torch.randn(2, 8), None, torch.ones(7), 1e-6)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(torch.randn(2, 8), torch.randn(2, 8).bfloat16(), torch.ones(8), 1e-6)


def test_meta_tensors_have_the_right_shapes() -> None:
    x = torch.empty(3, 8, device="meta")
    y, h = add_rms_norm(x, x.clone(), torch.ones(8, device="meta"), 1e-6)
    assert y.shape == h.shape == (3, 8) and y.is_meta


def test_reference_mode_uses_no_library() -> None:
    with using("reference"):
        residual = torch.randn(3, 16)
        _, h = add_rms_norm(torch.randn(3, 16), residual, torch.ones(16), 1e-6)
    assert h is not residual


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_offset_counts_before_anything_is_rounded(dtype: torch.dtype) -> None:
    """A weight that is small beside 1 must keep its digits, which 1 + weight in bfloat16 would lose."""
    x, weight = torch.randn(5, 48).to(dtype), (torch.randn(48) * 1e-3).to(dtype)
    wide = functional.rms_norm(x.double(), (48,), 1.0 + weight.double(), 1e-6)
    assert_rounds_to(add_rms_norm(x, None, weight, 1e-6, offset=1.0)[0], wide.to(dtype), steps=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_weight", [False, True])
def test_a_layer_norm_is_torchs_of_the_sum(with_weight: bool, with_bias: bool, width: int, dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 5, width) + 3
    x, residual = x.to(dtype), residual.to(dtype)
    weight = torch.randn(width).to(dtype) if with_weight else None
    bias = torch.randn(width).to(dtype) if with_bias else None
    for given in (None, residual):
        y, h = add_layer_norm(x, None if given is None else given.clone(), weight, bias, 1e-5)
        sum_ = x if given is None else x + given
        factors = (None if factor is None else factor.double() for factor in (weight, bias))
        expected = functional.layer_norm(sum_.double(), (width,), *factors, 1e-5)
        assert torch.equal(h, sum_)
        assert_rounds_to(y, expected.to(dtype), floor=2e-5)


def test_heads_of_a_fused_buffer_are_layer_normed_each_with_its_own_numbers() -> None:
    fused, weight, bias = torch.randn(5, 10 * 32), torch.randn(6, 32), torch.randn(6, 32)
    heads = fused[:, 64:256].view(5, 6, 32)
    y, h = add_layer_norm(heads, None, weight, bias, 1e-5)
    for head in range(6):
        assert_rounds_to(y[:, head], functional.layer_norm(heads[:, head], (32,), weight[head], bias[head], 1e-5))
    assert h is heads


def test_layer_norms_of_shapes_that_do_not_fit_are_refused() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="weight has shape"):
        add_layer_norm(x, None, torch.ones(7), None, 1e-5)
    with pytest.raises(ValueError, match="bias has shape"):
        add_layer_norm(x, None, None, torch.ones(2, 8), 1e-5)
    with pytest.raises(ValueError, match="residual"):
        add_layer_norm(x, x.bfloat16(), None, None, 1e-5)


def test_the_layer_norms_operator_passes_torchs_checks() -> None:
    x, factor = torch.randn(3, 8), torch.randn(8)
    torch.library.opcheck(_layer_operator, (x, x.clone(), factor, None, 1e-5))
    torch.library.opcheck(_layer_operator, (x, None, None, factor, 1e-5))
    y, h = add_layer_norm(torch.empty(3, 8, device="meta"), None, None, None, 1e-5)
    assert y.shape == h.shape == (3, 8) and y.is_meta


@pytest.mark.parametrize("rows", [1, 400])
def test_layer_norms_of_long_and_of_many_rows_agree_with_the_reference(variant: str, rows: int) -> None:
    """Many take the parallel path; the numbers are far from zero, where a sum of squares would cancel."""
    x, residual = torch.randn(rows, 1031) + 30, torch.randn(rows, 1031)
    weight, bias = torch.randn(1031), torch.randn(1031)
    expected_y, expected_h = reference.add_layer_norm(x, residual, weight, bias, 1e-5)
    y, h = add_layer_norm(x, residual, weight, bias, 1e-5)
    assert h.data_ptr() == residual.data_ptr() and torch.equal(h, expected_h)
    torch.testing.assert_close(y, expected_y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_a_layer_norms_output(variant: str, value: float) -> None:
    x = torch.randn(2, 100)
    x[1, 98] = value
    y, _ = add_layer_norm(x, None, None, None, 1e-5)
    assert y[1, 98].isnan() and y[0].isfinite().all()
