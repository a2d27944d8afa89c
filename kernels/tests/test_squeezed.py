"""Twelve bits hold sixteen: every bit of a weight comes back, and what is computed with it is the packed weight's."""

import gc
import threading

import pytest
import torch
from torch import Tensor

from bestiary_kernels import PackedLinear, Tape, library, linear, using
from bestiary_kernels.linear import _MOST_ROWS_SQUEEZED, MOST_ROWS, reference, squeezed
from bestiary_kernels.linear.squeezed import VARIABLE, Squeezed

from .cases import assert_rounds_to
from .conftest import NATIVE

pytestmark = [
    pytest.mark.skipif("avx2" not in NATIVE, reason="no kernel of ours reads squeezed weights here"),
    pytest.mark.usefixtures("squeezes_all"),
]


def weight_of(outputs: int, inputs: int, strange: int = 1999) -> Tensor:
    """Numbers as training leaves them, zeros of both signs, and every so many, of either input, any bits at all."""
    weight = (torch.randn(outputs, inputs) * 0.02).bfloat16()
    flat = weight.view(-1)
    flat[::97], flat[1::997] = 0.0, -0.0
    places = flat[::strange]
    places.copy_(torch.randint(-(2**15), 2**15, places.shape, dtype=torch.int16).view(torch.bfloat16))
    return weight


def both(weight: Tensor, bias: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> tuple[PackedLinear, PackedLinear]:
    """The same weight as it is packed, and squeezed."""
    monkeypatch.setenv(VARIABLE, "0")
    packed = PackedLinear(weight, bias)
    monkeypatch.delenv(VARIABLE)
    return packed, PackedLinear(weight, bias)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN equals itself."""
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (1000, 640), (130, 66), (64, 2), (320, 1040)])
def test_every_bit_of_a_weight_comes_back(outputs: int, inputs: int) -> None:
    packed = reference.pack(weight_of(outputs, inputs))
    held = Squeezed.of(packed, outputs)
    assert held is not None
    assert held.codes.nbytes * 4 == packed.nbytes * 3
    assert same_bits(held.packed(), packed)
    assert same_bits(reference.unsqueeze(held.codes, held.exponents, held.starts, held.exceptions), packed)
    for backend in ("portable", "reference"):
        with using(backend):
            assert same_bits(held.packed(), packed)


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (1000, 640), (130, 96), (320, 1024)])
def test_what_a_product_reads_follows_from_the_shape(
    outputs: int, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = (torch.randn(outputs, inputs) * 0.02).bfloat16()
    packed, held = both(weight, None, monkeypatch)
    if packed.form != "packed":
        pytest.skip("oneDNN lays this shape out in another way here")
    read = PackedLinear.bytes_read(outputs, inputs, weight.dtype)
    assert held.form == "squeezed" and read <= held.nbytes <= read + 4 * (weight.numel() // 256 + 1)
    monkeypatch.setenv(VARIABLE, "0")
    assert PackedLinear.bytes_read(outputs, inputs, weight.dtype) == weight.nbytes <= packed.nbytes
    assert PackedLinear.bytes_read(outputs, inputs, torch.float32) == 4 * outputs * inputs


def test_all_values_of_one_exponent_and_all_exceptions() -> None:
    assert Squeezed.of(reference.pack(torch.ones(64, 64).bfloat16()), 64) is not None
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).view(256, 256)
    assert Squeezed.of(reference.pack(every), 256) is None  # exponents are as common as each other: nothing is won


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(576, 192), (640, 2048), (192, 96)])
def test_products_and_rows_are_those_of_the_packed_weight_to_the_bit(
    outputs: int, inputs: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weight_of(outputs, inputs).nan_to_num(0.0, 1.0, -1.0).clamp(-4, 4)
    bias = torch.randn(outputs).bfloat16() if with_bias else None
    packed, held = both(weight, bias, monkeypatch)
    if packed.form != "packed":
        pytest.skip("oneDNN lays this shape out in another way here")
    assert held.form == "squeezed" and held.nbytes < 0.8 * packed.nbytes + 512
    for rows in (0, 1, 2, 5, 6, 7, 12, 13, 18, 19, 33, MOST_ROWS):
        x = torch.randn(rows, inputs + 8).bfloat16()[:, 5 : 5 + inputs]
        assert same_bits(held(x), packed(x)), rows
    for rows in (MOST_ROWS + 1, 131, _MOST_ROWS_SQUEEZED, _MOST_ROWS_SQUEEZED + 1):
        x = torch.randn(rows, inputs).bfloat16()
        assert_rounds_to(held(x), (x.double() @ weight.double().T + (0 if bias is None else bias.double())).bfloat16())
    ids = torch.randint(0, outputs, (40,))
    assert same_bits(held.embedding(ids), weight[ids])
    with pytest.raises(IndexError):
        held.embedding(torch.tensor([0, outputs]))


@pytest.mark.parametrize("backend", ["reference", "portable", "avx2"])
@pytest.mark.parametrize("rows", [1, 70])
def test_whatever_computes_later_understands_it(backend: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels may be changed after weights were loaded."""
    weight = weight_of(192, 128, 10**9)
    packed, held = both(weight, None, monkeypatch)
    x = torch.randn(rows, 128).bfloat16()
    with using(backend):
        assert_rounds_to(held(x), packed(x), floor=1e-4)
        assert same_bits(held.embedding(torch.tensor([5, 0])), weight[[5, 0]])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_cuts_between_threads_fall_anywhere_in_a_tile(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of(320, 2080, 500).nan_to_num(0.0, 1.0, -1.0).clamp(-4, 4)
    packed, held = both(weight, None, monkeypatch)
    assert held.form == "squeezed"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in (1, 9, 40):
            x = torch.randn(rows, 2080).bfloat16()
            assert same_bits(held(x), packed(x))
    finally:
        torch.set_num_threads(before)


def test_weights_of_a_shape_share_one_room_also_between_threads_and_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = library.active()
    if kernels is None or not kernels.has_pairs:
        pytest.skip("these kernels leave no product to oneDNN")
    monkeypatch.setattr(linear, "_TILE_INPUTS", 1 << 20)  # many rows are oneDNN's, also where AMX is
    weights = [weight_of(192, 128, 10**9) for _ in range(2)]
    layers = [PackedLinear(weight) for weight in weights]
    x = torch.randn(_MOST_ROWS_SQUEEZED + 1, 128).bfloat16()
    expected = [layer(x) for layer in layers]
    assert layers[0]._room is layers[1]._room is not None
    wrong: list[int] = []

    def compute(layer: PackedLinear, expected: Tensor) -> None:
        wrong.extend(i for i in range(50) if not torch.equal(layer(x), expected))

    threads = [threading.Thread(target=compute, args=pair) for pair in zip(layers, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    del layers, threads, thread
    gc.collect()
    assert (192, 128) not in linear._Room._of_shapes


def test_a_step_is_recorded_with_it() -> None:
    weight = weight_of(192, 192, 10**9)
    held, ids = PackedLinear(weight), torch.tensor([3, 100])
    _, tape = Tape.record(lambda: held(held.embedding(ids)))
    assert tape is not None
    ids[0] = 7
    assert torch.equal(tape.replay().clone(), held(held.embedding(ids)))


def test_a_compiled_graph_computes_with_it() -> None:
    held, x = PackedLinear(weight_of(192, 128, 10**9)), torch.randn(3, 128).bfloat16()
    y = torch.compile(lambda x: held(x) + 1, backend="eager", fullgraph=True)(x)
    assert_rounds_to(y, held(x) + 1, floor=1e-4)
    assert held(torch.empty(3, 128, dtype=torch.bfloat16, device="meta")).shape == (3, 192)


def test_small_weights_and_those_of_who_does_not_want_it_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of(192, 128)
    monkeypatch.setenv(VARIABLE, "0")
    assert PackedLinear(weight).form == "packed"
    monkeypatch.setenv(VARIABLE, "no")
    with pytest.raises(ValueError, match="BESTIARY_SQUEEZE='no' is unknown; choose 0 or 1"):
        PackedLinear(weight)
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(squeezed, "_LEAST", weight.nbytes + 1)
    assert PackedLinear(weight).form == "packed"
