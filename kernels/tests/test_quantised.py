"""Weights of few bits: what does not depend on the drawn shapes of the grid."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bestiary_kernels import PackedLinear, QuantisedLinear, Tape, gpu, library, quantise, quantised
from bestiary_kernels.quantised import _operator, reference

from .grid.interpreter import interpreted

KINDS = [(8, 32), (4, 32), (4, 64), (4, 128)]
needs_library = pytest.mark.skipif(library.active() is None, reason="no C++ library is in use")


@pytest.mark.parametrize(("bits", "group"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_whatever_its_company(variant: str, dtype: torch.dtype, bits: int, group: int) -> None:
    layer = QuantisedLinear(torch.randn(200, 700).to(dtype), torch.randn(200).to(dtype), bits=bits, group=group)
    x = torch.randn(300, 700).to(dtype)
    together = layer(x)
    for first, count in ((0, 1), (1, 2), (3, 4), (7, 5), (20, 6), (30, 7), (40, 33), (90, 128), (20, 129)):
        assert torch.equal(layer(x[first : first + count]), together[first : first + count])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_pieces_of_threads_lose_nothing_and_are_added_in_their_order(
    variant: str, threads: int, bits: int, group: int
) -> None:
    layer, before = QuantisedLinear(torch.randn(70, 3000).bfloat16(), bits=bits, group=group), torch.get_num_threads()
    x = torch.randn(9, 3000).bfloat16()
    with library.using("reference"):
        wanted = layer(x)
    torch.set_num_threads(threads)
    try:
        found = [layer(x) for _ in range(5)]
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[0], wanted, atol=0.02 * 55, rtol=0.01)
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.skipif(not gpu.is_installed(), reason="Triton is not installed")
@pytest.mark.parametrize(("bits", "group"), KINDS)
@pytest.mark.parametrize("processors", [1, 2, 30])
def test_shares_of_the_inputs_add_up_however_many_there_are(
    bits: int, group: int, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bestiary_kernels.quantised import triton

    monkeypatch.setattr(triton, "_processors", lambda device: processors)
    weight, x = torch.randn(40, 550), torch.randn(3, 550)
    with interpreted():
        found = QuantisedLinear(weight, bits=bits, group=group)(x)
    with library.using("reference"):
        wanted = QuantisedLinear(weight, bits=bits, group=group)(x)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-5)


@settings(deadline=None)
@given(
    outputs=st.integers(1, 140),
    inputs=st.integers(1, 300),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**20),
)
def test_codes_come_out_as_they_were_packed(outputs: int, inputs: int, kind: tuple[int, int], seed: int) -> None:
    bits, group = kind
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    codes, scales = quantise(weight, bits, group)
    for in_pairs in (False, True):
        packed = reference.pack(codes, bits, in_pairs)
        assert packed.shape == reference.packed_shape(outputs, inputs, bits, in_pairs)
        assert torch.equal(reference.unpack(packed, bits, outputs, inputs), codes)
    assert torch.equal(reference.unpack_rows(reference.pack_rows(codes, bits, group), bits, group, inputs), codes)
    assert torch.equal(reference.unpack_scales(reference.pack_scales(scales), outputs), scales)


@pytest.mark.parametrize(("bits", "group"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (70, 33), (1, 1), (130, 1000), (300, 576)])
def test_the_library_rounds_as_the_reference(
    variant: str, outputs: int, inputs: int, dtype: torch.dtype, bits: int, group: int
) -> None:
    weight = torch.randn(outputs, inputs)
    weight[0] *= (
        torch.randint(-3, 4, (inputs,)) / 4
    )  # many halves between two codes, and farthest numbers of both signs
    weight[-1] = torch.randint(-3, 4, (inputs,)) / 4
    found = QuantisedLinear(weight.to(dtype), bits=bits, group=group)
    codes, scales = quantise(weight.to(dtype), bits, group)
    kernels = library.active()
    lie, packed = reference.pack_scales(scales), reference.pack(codes, bits, kernels is not None and kernels.has_pairs)
    assert torch.equal(found._scales, lie) and found._scales.dtype is lie.dtype
    assert torch.equal(found._codes, packed) and found._codes.dtype is packed.dtype


@needs_library
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_that_lie_for_another_instruction_set_are_read_as_they_lie(variant: str, bits: int) -> None:
    weight, x = torch.randn(100, 70), torch.randn(3, 70)
    wanted = QuantisedLinear(weight, bits=bits)(x)
    for other in library.status().available:
        with library.using(other):
            layer = QuantisedLinear(weight, bits=bits)
        torch.testing.assert_close(layer(x), wanted, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_take_few_bytes(bits: int) -> None:
    weight = torch.randn(128, 256).bfloat16()
    layer = QuantisedLinear(weight, bits=bits)
    assert layer.nbytes == QuantisedLinear.size(128, 256, bits) == 128 * (256 + 4 if bits == 8 else 128 + 16)
    assert layer.nbytes < 0.6 * weight.nbytes


@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_of_zeros_gives_zeros_and_one_of_powers_of_two_itself(variant: str, bits: int) -> None:
    weight = torch.zeros(65, 64)
    weight[1, :32] = torch.tensor([-8.0, 4.0, 2.0, 1.0] * 8) * 0.25
    x = torch.eye(64)
    found = QuantisedLinear(weight, bits=bits)(x).T
    assert not found[0].any() and not found[2:].any()
    torch.testing.assert_close(found, weight, atol=0 if bits == 4 else 0.01, rtol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_nan_reaches_the_output(variant: str, bits: int) -> None:
    x, weight = torch.ones(2, 32).bfloat16(), torch.ones(70, 32).bfloat16()
    x[1, 5] = float("nan")
    weight[3, 3] = float("nan")
    y = QuantisedLinear(weight, bits=bits)(x)
    assert y[1].isnan().all() and y[0, 3].isnan() and y[0].isfinite().sum() == 69


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_steps_with_the_product_are_recorded(dtype: torch.dtype, bits: int) -> None:
    first, second = (QuantisedLinear(torch.randn(96, 96).to(dtype), bits=bits) for _ in range(2))
    x = torch.randn(3, 96).to(dtype)
    _, tape = Tape.record(lambda: second(first(x)))
    assert tape is not None
    x.copy_(torch.randn(3, 96))
    assert torch.equal(tape.replay(), second(first(x)))


def test_without_the_library_the_same_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(1100, 96).bfloat16(), torch.randn(3, 96).bfloat16()
    for bits in (8, 4):
        layer = QuantisedLinear(weight, torch.randn(1100).bfloat16(), bits=bits)
        with library.using("reference"):
            found = layer(x)
        torch.testing.assert_close(found, layer(x), atol=0.05, rtol=0.01)
    exact = PackedLinear(weight)(x)
    assert (QuantisedLinear(weight)(x) - exact).abs().max() < 0.02 * exact.abs().max()


def test_shapes_dtypes_and_kinds_that_do_not_fit_are_refused() -> None:
    weight = torch.randn(4, 5)
    for bits, group in ((2, 32), (4, 16), (16, 32)):
        with pytest.raises(ValueError, match=f"{bits} bits in groups of {group}"):
            QuantisedLinear(weight, bits=bits, group=group)
    with pytest.raises(ValueError, match="floating point"):
        quantise(weight.to(torch.int8))
    with pytest.raises(ValueError, match="K not 0"):
        QuantisedLinear(weight[:, :0])
    with pytest.raises(ValueError, match="bias"):
        QuantisedLinear(weight, torch.randn(5))
    with pytest.raises(ValueError, match="bias"):
        QuantisedLinear(weight, torch.randn(4).bfloat16())
    with pytest.raises(ValueError, match="4 inputs"):
        QuantisedLinear(weight)(torch.randn(1, 4))
    with pytest.raises(ValueError, match="bfloat16"):
        QuantisedLinear(weight)(torch.randn(1, 5).bfloat16())


def test_meta_rows_have_their_shape() -> None:
    assert QuantisedLinear(torch.randn(4, 6))(torch.empty(3, 6, device="meta")).shape == (3, 4)
    assert quantised.__all__ == ["QuantisedLinear", "dequantise", "quantise"]


@pytest.mark.parametrize("bits", [8, 4])
def test_the_operation_passes_torchs_checks_and_compiled_code_goes_through_it(bits: int) -> None:
    x, product = torch.randn(3, 70), QuantisedLinear(torch.randn(100, 70), torch.randn(100), bits=bits)
    torch.library.opcheck(_operator, (x, product._codes, product._scales, product.bias, 100, bits, product.group))
    compiled = torch.compile(lambda x: product(x) + 1, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), product(x) + 1)
