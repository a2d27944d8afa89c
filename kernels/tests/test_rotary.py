"""Rotary embedding: the references against other forms of it, every C++ variant against the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bestiary_kernels import library, rotary, rotary_cache_write
from bestiary_kernels.rotary import _plain_operator, reference

from .cases import assert_rounds_to

DTYPES = [torch.float32, torch.bfloat16]
BACKENDS = library.status().available


def angles(rotary_width: int, positions: int = 64) -> Tensor:
    """cos_sin [positions, 2, R/2]."""
    turn = torch.arange(positions)[:, None] * 10000.0 ** -torch.linspace(0, 1, rotary_width // 2)
    return torch.stack([turn.cos(), turn.sin()], 1)


def inputs(tokens: int, dtype: torch.dtype, *, width: int = 64, block_size: int = 16) -> dict[str, Any]:
    """q, k, v as views of one buffer (6 and 2 heads), positions, slots with a hole, and zero caches."""
    fused = torch.randn(tokens, 10, width).to(dtype)
    blocks = tokens // block_size + 3
    slots = torch.randperm(blocks * block_size)[:tokens]
    slots[tokens // 2 : tokens // 2 + 1] = -1
    return {
        "q": fused[:, :6],
        "k": fused[:, 6:8],
        "v": fused[:, 8:],
        "positions": torch.randint(0, 64, (tokens,)),
        "slots": slots,
        "k_cache": torch.zeros(blocks, 2, block_size, width, dtype=dtype),
        "v_cache": torch.zeros(blocks, 2, block_size, width, dtype=dtype),
    }


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() for name, value in arguments.items()}


@pytest.mark.parametrize("interleaved", [False, True])
def test_reference_is_a_rotation_of_complex_numbers(interleaved: bool) -> None:
    given = inputs(9, torch.float32)
    table, before = angles(64), given["q"].clone()
    reference.rotary_cache_write(cos_sin=table, interleaved=interleaved, **given)
    pairs = before.reshape(9, 6, 32, 2) if interleaved else before.reshape(9, 6, 2, 32).transpose(-1, -2)
    turn = torch.complex(table[given["positions"]][:, 0], table[given["positions"]][:, 1])[:, None]
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    expected = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(given["q"], expected)
    for token, slot in enumerate(given["slots"].tolist()):
        if slot >= 0:
            assert torch.equal(given["k_cache"][slot // 16, :, slot % 16], given["k"][token])
            assert torch.equal(given["v_cache"][slot // 16, :, slot % 16], given["v"][token])
    assert int((given["v_cache"] != 0).any(-1).sum()) == 2 * 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "rotary_width", "block_size"), [(64, 64, 16), (80, 32, 5), (20, 12, 16), (64, 0, 5)])
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 130])
def test_every_variant_agrees_with_the_reference(
    variant: str, tokens: int, width: int, rotary_width: int, block_size: int, interleaved: bool, dtype: torch.dtype
) -> None:
    given = inputs(tokens, dtype, width=width, block_size=block_size)
    expected = copied(given)
    table = angles(rotary_width) if rotary_width else None
    rotary_cache_write(cos_sin=table, interleaved=interleaved, **given)
    reference.rotary_cache_write(cos_sin=table, interleaved=interleaved, **expected)
    for name, value in given.items():
        assert_rounds_to(value, expected[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "value"), [("slots", 4 * 16), ("positions", 64), ("positions", -1)])
def test_out_of_range_is_refused_before_anything_is_written(backend: str, name: str, value: int) -> None:
    given = inputs(20, torch.float32)
    given[name][-1] = value
    before = copied(given)
    with library.using(backend), pytest.raises(IndexError, match="rotary_cache_write"):
        rotary_cache_write(cos_sin=angles(64), **given)
    assert all(torch.equal(given[name], before[name]) for name in given)


def test_caches_may_be_halves_of_one_tensor(variant: str) -> None:
    given = inputs(5, torch.float32)
    both = torch.zeros(4, 2, 2, 16, 64)
    expected = copied(given)
    given["k_cache"], given["v_cache"] = both[:, 0], both[:, 1]
    expected["k_cache"], expected["v_cache"] = torch.zeros(4, 2, 16, 64), torch.zeros(4, 2, 16, 64)
    rotary_cache_write(cos_sin=angles(64), **given)
    reference.rotary_cache_write(cos_sin=angles(64), **expected)
    assert_rounds_to(both[:, 0], expected["k_cache"])
    assert_rounds_to(both[:, 1], expected["v_cache"])


def test_nan_reaches_q_and_the_cache(variant: str) -> None:
    given = inputs(1, torch.float32)
    given["slots"][0] = 0
    given["q"][0, 0, 3] = given["k"][0, 1, 3] = float("nan")
    rotary_cache_write(cos_sin=angles(64), **given)
    assert given["q"][0, 0, [3, 35]].isnan().all() and given["k_cache"][0, 1, 0, [3, 35]].isnan().all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    given = inputs(3, torch.float32)
    given["slots"] = given["slots"][:2]
    with pytest.raises(ValueError, match="rotary_cache_write"):
        rotary_cache_write(cos_sin=None, **given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_width", [16, 12])
def test_the_rotation_alone_is_transformers_and_leaves_its_input(rotary_width: int, dtype: torch.dtype) -> None:
    oracle = pytest.importorskip("transformers.models.llama.modeling_llama").apply_rotary_pos_emb
    table, positions = angles(rotary_width), torch.randint(0, 64, (9,))
    whole = torch.randn(9, 3, 40).to(dtype)
    x, before = whole[..., 24:], whole.clone()
    cos, sin = table[positions].repeat(1, 1, 2).unbind(1)
    turned = x[None, ..., :rotary_width].double()
    expected = oracle(turned, turned, cos[None], sin[None], unsqueeze_dim=2)[0][0].to(dtype)
    y = rotary(x, table, positions)
    assert_rounds_to(y[..., :rotary_width], expected, steps=0.5)
    assert torch.equal(y[..., rotary_width:], x[..., rotary_width:]) and torch.equal(whole, before)
    assert y.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_interleaved_rotation_alone_is_deepseeks(dtype: torch.dtype) -> None:
    oracle = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2").apply_rotary_emb
    table, positions = angles(16), torch.randint(0, 64, (9,))
    x = torch.randn(9, 3, 16).to(dtype)
    turn = torch.complex(*table[positions].unbind(1))
    by_head = x.transpose(0, 1)[None]
    expected = oracle(by_head, by_head, turn[None])[0][0].transpose(0, 1)
    assert_rounds_to(rotary(x, table, positions, interleaved=True), expected)


@pytest.mark.parametrize("position", [-1, 64])
def test_the_rotation_alone_refuses_what_does_not_fit(position: int) -> None:
    x, table, positions = torch.randn(2, 3, 16), angles(16), torch.tensor([3, position])
    with pytest.raises(IndexError, match="rotary: a position"):
        rotary(x, table, positions)
    for wrong in ((x[..., :15], table, positions), (x, table, positions[:1]), (x, table[:, 0], positions)):
        with pytest.raises(ValueError, match="rotary: the shapes"):
            rotary(*wrong)


def test_the_rotations_operator_passes_torchs_checks() -> None:
    torch.library.opcheck(_plain_operator, (torch.randn(2, 3, 16), angles(12), torch.tensor([3, 0]), True))
    meta = torch.empty(2, 3, 16, device="meta")
    assert rotary(meta, angles(16), torch.tensor([3, 0])).shape == (2, 3, 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "rotary_width"), [(64, 64), (80, 32), (20, 12)])
@pytest.mark.parametrize("tokens", [0, 3, 400])
def test_every_variants_rotation_alone_agrees_with_the_reference(
    variant: str, tokens: int, width: int, rotary_width: int, interleaved: bool, dtype: torch.dtype
) -> None:
    x = torch.randn(tokens, 5, width + 7).to(dtype)[..., 7:]
    table, positions = angles(rotary_width), torch.randint(0, 64, (tokens,))
    y = rotary(x, table, positions, interleaved)
    assert_rounds_to(y, reference.rotary(x, table, positions, interleaved))
