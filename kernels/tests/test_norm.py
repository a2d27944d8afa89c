"""add_rms_norm: the reference against torch's own norm, every C++ variant against the reference."""

import pytest
import torch
from torch.nn import functional

from bestiary_kernels import add_rms_norm, using
from bestiary_kernels.norm import reference

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
