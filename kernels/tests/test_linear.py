"""PackedLinear: every form against torch's linear, and the packed layout against its source."""

import pytest
import torch
from torch.nn import functional

from bestiary_kernels import PackedLinear, activation, gated_activation, library, linear, using
from bestiary_kernels.activation import KINDS, PLAIN_KINDS
from bestiary_kernels.linear import MOST_ROWS, _operator, reference

from .cases import assert_rounds_to
from .conftest import NATIVE

DTYPES = [torch.float32, torch.bfloat16]


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product in float64, rounded once."""
    wide = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return wide.to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(576, 192), (64, 2), (100, 64), (1, 8), (130, 33)])
def test_every_row_count_agrees_with_the_product(
    variant: str, outputs: int, inputs: int, with_bias: bool, dtype: torch.dtype
) -> None:
    weight = torch.randn(outputs, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if with_bias else None
    layer = PackedLinear(weight, bias)
    for rows in (0, 1, 2, 3, 4, 5, 6, 7, 12, 17, 33, 64, 65):
        x = torch.randn(rows, inputs).to(dtype)
        assert_rounds_to(layer(x), product(x, weight, bias), floor=1e-4)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(65, 40, 32), (100, 200, 64), (70, 4160, 160), (530, 130, 4160), (1100, 65, 96)]
)
def test_many_rows_of_every_cut_agree_with_the_product(
    variant: str, rows: int, outputs: int, inputs: int, with_bias: bool
) -> None:
    weight = torch.randn(outputs, inputs).bfloat16()
    bias = torch.randn(outputs).bfloat16() if with_bias else None
    layer = PackedLinear(weight, bias)
    x = torch.randn(rows, inputs + 6).bfloat16()[:, 3:-3]
    assert_rounds_to(layer(x), product(x, weight, bias), floor=1e-3)


@pytest.mark.parametrize(
    ("kind", "gated"), [*((kind, True) for kind in KINDS), *((kind, False) for kind in PLAIN_KINDS)]
)
def test_activated_is_the_activation_of_the_product_to_the_bit(variant: str, kind: str, gated: bool) -> None:
    for rows, outputs, inputs in ((3, 128, 64), (65, 128, 32), (70, 130, 64), (330, 640, 4160), (1100, 256, 96)):
        bias = torch.randn(outputs).bfloat16() if rows % 2 else None
        layer = PackedLinear((torch.randn(outputs, inputs) / inputs**0.5).bfloat16(), bias)
        x = torch.randn(rows, inputs + 6).bfloat16()[:, 3:-3]
        x[rows // 2, 0] = float("nan")
        expected = (gated_activation if gated else activation)(layer(x), kind)
        torch.testing.assert_close(layer.activated(x, kind, gated=gated), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif("amx_bf16" not in NATIVE, reason="no product of many rows of ours runs here")
def test_activated_is_one_pass_where_our_product_of_many_rows_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = PackedLinear(torch.randn(2048, 256).bfloat16()), torch.randn(65, 256).bfloat16()
    if layer.form == "opaque":
        pytest.skip("oneDNN lays this shape out in another way here")
    expected = gated_activation(layer(x))
    monkeypatch.setattr(linear, "gated_activation", None)
    assert torch.equal(layer.activated(x, "silu", gated=True), expected)


def test_a_row_comes_out_alike_in_any_company(variant: str) -> None:
    """Of what our kernels compute: any number of rows, or as many as are few where oneDNN has the others."""
    layer, rows = PackedLinear(torch.randn(200, 320).bfloat16(), torch.randn(200).bfloat16()), MOST_ROWS
    kernels = library.active()
    if kernels is not None and not kernels.has_pairs:
        rows = 3 * MOST_ROWS
    x = torch.randn(rows, 330).bfloat16()[:, 5:-5]
    together = layer(x)
    for some in (slice(0, 1), slice(1, 3), slice(5, 11), slice(13, 20), slice(20, MOST_ROWS)):
        assert torch.equal(layer(x[some]), together[some])


@pytest.mark.parametrize("backend", [variant for variant in NATIVE if variant not in ("avx512_bf16", "amx_bf16")])
def test_without_products_of_pairs_every_even_weight_is_packed_by_us(backend: str) -> None:
    weight, bias = torch.randn(130, 70).bfloat16(), torch.randn(130).bfloat16()
    x = torch.randn(90, 70).bfloat16()
    with using(backend):
        layer = PackedLinear(weight, bias)
        assert layer.form == "packed" and layer.nbytes == reference.pack(weight).nbytes
        assert torch.equal(layer.embedding(torch.arange(130)), weight)
        assert_rounds_to(layer(x), product(x, weight, bias), floor=1e-4)
        assert PackedLinear(weight[:, :69].contiguous()).form != "packed"
    for later in ("reference", *NATIVE):
        with using(later):
            assert_rounds_to(layer(x), product(x, weight, bias), floor=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_cut_of_a_block_between_threads_loses_nothing(variant: str, threads: int) -> None:
    weight, before = torch.randn(200, 1000).bfloat16(), torch.get_num_threads()
    layer, x = PackedLinear(weight), torch.randn(MOST_ROWS, 1000).bfloat16()
    torch.set_num_threads(threads)
    try:
        assert_rounds_to(layer(x), product(x, weight, None), floor=1e-4)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_embedding_returns_the_weights_rows(backend: str, dtype: torch.dtype) -> None:
    weight = torch.randn(150, 32).to(dtype)
    layer = PackedLinear(weight, keep_rows=True)
    ids = torch.tensor([149, 0, 63, 64, 0])
    with using(backend):
        assert torch.equal(layer.embedding(ids), weight[ids])
        assert layer.embedding(ids[:0]).shape == (0, 32)
        for outside in (-1, 150):
            with pytest.raises(IndexError):
                layer.embedding(torch.tensor([1, outside]))


def test_a_packed_weight_that_cannot_be_read_says_so() -> None:
    layer = PackedLinear(torch.randn(40, 33).bfloat16())
    if layer.form != "opaque":
        pytest.skip("oneDNN keeps this shape readable here")
    with pytest.raises(RuntimeError, match="keep_rows"):
        layer.embedding(torch.tensor([0]))
    assert PackedLinear(torch.randn(40, 33).bfloat16(), keep_rows=True).embedding(torch.tensor([0])).shape == (1, 33)


def test_a_layout_in_which_the_rows_are_not_found_is_left_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = linear._pack
    monkeypatch.setattr(linear, "_pack", lambda weight: pack(weight.flip(0)))
    assert PackedLinear(torch.randn(4096, 256).bfloat16()).form == "opaque"
    assert PackedLinear(torch.randn(128, 32)).form == "opaque"


@pytest.mark.skipif("avx512_bf16" not in NATIVE, reason="no product of ours reads it")
def test_a_small_weight_that_onednn_packs_in_its_own_way_is_kept_in_ours_too() -> None:
    weight, bias = torch.randn(150, 48).bfloat16(), torch.randn(150).bfloat16()
    layer = PackedLinear(weight, bias)
    if layer.form == "packed":
        pytest.skip("oneDNN packs this shape in the way that we know")
    assert layer.form == "both" and torch.equal(layer.embedding(torch.arange(150)), weight)
    for rows in (1, 7, 64, 65):
        x = torch.randn(rows, 60).bfloat16()[:, 5:53]
        assert_rounds_to(layer(x), product(x, weight, bias), floor=1e-4)


def test_without_onednn_the_weight_itself_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    weight, x = torch.randn(10, 8), torch.randn(2, 8)
    layer = PackedLinear(weight)
    assert layer.form == "plain" and layer.nbytes == weight.nbytes
    assert torch.equal(layer(x), functional.linear(x, weight))
    assert torch.equal(layer.embedding(torch.tensor([3])), weight[3:4])


def test_packed_reference_means_the_product() -> None:
    weight, x = torch.randn(64, 6).bfloat16(), torch.randn(2, 6).bfloat16()
    packed = weight.view(1, 64, 3, 2).transpose(1, 2).contiguous()
    assert torch.equal(reference.embedding_packed(packed, torch.arange(64)), weight)
    assert_rounds_to(reference.linear_packed(packed, x, None, 64), product(x, weight, None))


def test_nan_reaches_the_output() -> None:
    weight, x = torch.ones(70, 32).bfloat16(), torch.ones(2, 32).bfloat16()
    x[1, 5] = float("nan")
    y = PackedLinear(weight)(x)
    assert y[0].isfinite().all() and y[1].isnan().all()


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="bias"):
        PackedLinear(torch.randn(4, 4), torch.randn(5))
    with pytest.raises(ValueError, match="4 inputs"):
        PackedLinear(torch.randn(4, 5))(torch.randn(1, 4))
    with pytest.raises(ValueError, match="4 inputs"):
        PackedLinear(torch.randn(4, 5)).activated(torch.randn(1, 4), "silu")
    with pytest.raises(ValueError, match="swish"):
        PackedLinear(torch.randn(4, 5)).activated(torch.randn(1, 5), "swish")


def test_meta_rows_have_their_shape() -> None:
    assert PackedLinear(torch.randn(4, 6))(torch.empty(3, 6, device="meta")).shape == (3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operation_passes_torchs_checks_and_compiled_code_goes_through_it(dtype: torch.dtype) -> None:
    weight, bias, x = torch.randn(70, 6).to(dtype), torch.randn(70).to(dtype), torch.randn(3, 6).to(dtype)
    torch.library.opcheck(_operator, (x, weight, bias, 70))
    torch.library.opcheck(_operator, (x, reference.pack(weight), None, 70))
    product = PackedLinear(weight, bias, keep_rows=True)
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    y = torch.compile(lambda x: product(x) + 1, backend=keep, fullgraph=True)(x)
    torch.testing.assert_close(y, product(x) + 1)
    assert "bestiary.packed_linear" in str(graphs[0].code)
