"""Names: where each tensor goes, and what each operation does to it. Fused layouts are checked against transformers."""

import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bestiary.checkpoint import Interleaved, Names, Split, Target, Transpose
from bestiary.errors import PluginBroken, TensorMismatch


class Matrix:
    """What a table of names sees of a fused module."""

    def __init__(self, unit: int = 1, **parts: int) -> None:
        self.parts, self.unit, self.stack = parts, unit, 0


def numbered(*shape: int) -> Tensor:
    """Every element another value, so that any mix-up of rows shows."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def place(names: Names, name: str) -> tuple[str | None, str | None, str, int | None]:
    target = names.find(name)
    assert target is not None
    return target.path, target.part, target.suffix, target.index


DECODER = Names(
    ("model.embed_tokens", "embed"),
    ("model.layers.*.self_attn.q_proj", "layers.*.mixer.qkv[q]"),
    ("model.layers.*.mamba.A_log", "layers.*.mixer.a_log"),
    ("model.layers.*.mamba.conv1d.weight", "layers.*.mixer.conv"),
    ("model.layers.*.mamba.conv1d.bias", "layers.*.mixer.conv_bias"),
    ("model.layers.*.self_attn.rotary_emb.inv_freq", None),
    ("model.layers.*.moe.experts.*.w1", "layers.*.ffn.experts.gate_up[gate]"),
    ("model.layers.*.attn.in_proj_bias", "layers.*.mixer.qkv:bias", Split("q", "k", "v")),
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", ("embed", None, "weight", None)),
        ("model.layers.31.self_attn.q_proj.weight", ("layers.31.mixer.qkv", "q", "weight", None)),
        ("model.layers.0.self_attn.q_proj.bias", ("layers.0.mixer.qkv", "q", "bias", None)),
        ("model.layers.0.self_attn.q_proj.weight_scale", ("layers.0.mixer.qkv", "q", "weight_scale", None)),
        ("model.layers.2.mamba.A_log", ("layers.2.mixer.a_log", None, "weight", None)),
        ("model.layers.2.mamba.conv1d.weight", ("layers.2.mixer.conv", None, "weight", None)),
        ("model.layers.2.mamba.conv1d.bias", ("layers.2.mixer.conv_bias", None, "weight", None)),
        ("model.layers.3.moe.experts.17.w1.weight", ("layers.3.ffn.experts.gate_up", "gate", "weight", 17)),
        ("model.layers.4.attn.in_proj_bias", ("layers.4.mixer.qkv", None, "bias", None)),
        ("model.layers.5.self_attn.rotary_emb.inv_freq", (None, None, "weight", None)),
    ],
)
def test_a_row_leads_its_module_and_all_its_tensors_to_one_place(
    name: str, expected: tuple[str | None, str | None, str, int | None]
) -> None:
    assert place(DECODER, name) == expected


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_token.weight",
        "embed_tokens.weight",
        "model.layers.self_attn.q_proj.weight",
        "model.layers.x.self_attn.q_proj.weight",
        "model.layers.-1.self_attn.q_proj.weight",
        "model.layers.٣.self_attn.q_proj.weight",
        "model.layers.²3.self_attn.q_proj.weight",
        "model.layers.*.self_attn.q_proj.weight",
        "model.layers.0.moe.experts.*.w1.weight",
        "model.layers.0.moe.experts." + "9" * 5000 + ".w1.weight",
        "model.layers.0.self_attn.q_proj.lora.weight",
        "model.layers.0.attn.in_proj_bias.weight",
        "",
        ".",
        "..",
    ],
)
def test_a_name_that_no_row_speaks_of_is_not_found(name: str) -> None:
    assert DECODER.find(name) is None


@given(st.text())
def test_any_text_can_be_looked_up(name: str) -> None:
    assert DECODER.find(name) is None or name.startswith("model.")


def test_a_row_with_a_number_of_its_own_goes_before_one_with_a_star() -> None:
    names = Names(("score.0", "score.hidden"), ("score.*", "score.rest.*"), ("score.2", "score.out"))
    assert place(names, "score.0.weight")[0] == "score.hidden"
    assert place(names, "score.2.bias")[0] == "score.out"
    assert place(names, "score.1.weight")[0] == "score.rest.1"


def test_a_whole_tensor_of_a_number_that_no_row_has_is_not_found() -> None:
    assert Names(("table.0", "first"), ("table.2", "third")).find("table.1") is None


def test_of_two_rows_with_as_many_stars_the_later_holds() -> None:
    names = Names(("a.*.b.0", "first.*"), ("a.0.b.*", "second.*"))
    assert place(names, "a.0.b.0.weight")[0] == "second.0"
    assert place(names, "a.1.b.0.weight")[0] == "first.1"


def test_a_whole_tensors_row_goes_before_its_modules_row() -> None:
    names = Names(("conv", "conv"), ("conv.bias", "conv_bias"))
    assert place(names, "conv.bias") == ("conv_bias", None, "weight", None)
    assert place(names, "conv.weight") == ("conv", None, "weight", None)


def test_tables_add_up_and_the_later_overrides_the_same_source() -> None:
    changed = DECODER + Names(("model.embed_tokens", "table"), ("lm_head", "head"))
    assert place(changed, "model.embed_tokens.weight")[0] == "table"
    assert place(changed, "lm_head.weight")[0] == "head"
    assert place(changed, "model.layers.2.mamba.A_log")[0] == "layers.2.mixer.a_log"
    assert place(DECODER, "model.embed_tokens.weight")[0] == "embed"


def test_an_optional_prefix_may_be_missing_from_the_file() -> None:
    names = Names(
        ("transformer.h.*.attn.c_attn", "layers.*.mixer.qkv", Transpose(), Split("q", "k", "v")), ("lm_head", "head")
    ).optional("transformer.")
    with_prefix, without = names.find("transformer.h.3.attn.c_attn.weight"), names.find("h.3.attn.c_attn.weight")
    assert with_prefix == without
    assert without is not None and without.path == "layers.3.mixer.qkv"
    assert names.find("lm_head.weight") is not None


def test_an_optional_prefix_leaves_rows_that_are_spelled_out_alone() -> None:
    names = Names(("model.norm", "norm"), ("norm", "other")).optional("model.")
    assert place(names, "norm.weight")[0] == "other"


def test_a_table_stands_under_prefixes_of_a_larger_model() -> None:
    tower = Names(("blocks.*.qkv", "layers.*.mixer.qkv", Split("q", "k")), ("norm", "norm"), ("position_ids", None))
    names = tower.under("vision_tower.", "encoder.tower.") + Names(("norm", "norm"))
    found = names.find("vision_tower.blocks.3.qkv.weight")
    assert found is not None
    assert (found.path, found.cut) == ("encoder.tower.layers.3.mixer.qkv", tower.find("blocks.3.qkv.weight").cut)  # type: ignore[union-attr]
    assert place(names, "vision_tower.norm.weight")[0] == "encoder.tower.norm"
    assert place(names, "norm.weight")[0] == "norm"
    assert place(names, "vision_tower.position_ids")[0] is None
    assert names.find("blocks.3.qkv.weight") is None


def test_stars_of_a_prefix_come_before_those_of_the_rows() -> None:
    names = Names(("layers.*.norm", "layers.*.norm")).under("towers.*.", "encoder.*.")
    assert place(names, "towers.1.layers.7.norm.weight")[0] == "encoder.1.layers.7.norm"


def test_an_empty_prefix_changes_nothing_and_one_without_a_dot_is_refused() -> None:
    assert place(DECODER.under("", ""), "model.embed_tokens.weight")[0] == "embed"
    for prefixes in (("tower", ""), ("", "tower")):
        with pytest.raises(PluginBroken, match="ends in a dot"):
            DECODER.under(*prefixes)


def test_looking_up_a_name_takes_no_notice_of_how_many_rows_there_are() -> None:
    names = Names(*((f"model.layers.*.kind{i}.proj", f"layers.*.kind{i}") for i in range(3000)))
    began = time.process_time()
    for i in range(20_000):
        assert names.find(f"model.layers.{i}.kind{i % 3000}.proj.weight") is not None
    assert time.process_time() - began < 3


# What each operation does to rows.


def pieces(names: Names, name: str, tensor: Tensor, module: Matrix) -> dict[str, Tensor]:
    target = names.find(name)
    assert target is not None
    return {part: piece for part, piece, _ in target.pieces(tensor, module)}


def test_without_an_operation_a_tensor_is_its_part() -> None:
    tensor = numbered(4, 3)
    named = pieces(Names(("q_proj", "qkv[q]")), "q_proj.weight", tensor, Matrix(q=4, k=2, v=2))
    assert list(named) == ["q"] and named["q"] is tensor
    assert list(pieces(Names(("norm", "norm")), "norm.weight", tensor, Matrix(anything=4))) == ["anything"]


def test_split_cuts_parts_that_lie_below_each_other_in_the_order_of_the_file() -> None:
    tensor = numbered(8, 3)
    found = pieces(Names(("wqkv", "qkv", Split("q", "k", "v"))), "wqkv.weight", tensor, Matrix(v=2, k=2, q=4))
    assert torch.equal(found["q"], tensor[:4])
    assert torch.equal(found["k"], tensor[4:6])
    assert torch.equal(found["v"], tensor[6:])


def test_split_cuts_a_bias_as_it_cuts_the_weight() -> None:
    found = pieces(Names(("up_gate", "m", Split("up", "gate"))), "up_gate.bias", numbered(5), Matrix(gate=3, up=2))
    assert found["up"].tolist() == [0, 1]
    assert found["gate"].tolist() == [2, 3, 4]


def test_transpose_turns_a_convolutions_weight_into_the_linear_that_computes_the_same() -> None:
    from transformers.pytorch_utils import Conv1D

    stored = Conv1D(nf=6, nx=4)  # type: ignore[no-untyped-call]
    x = torch.randn(5, 4)
    torch.nn.init.normal_(stored.bias)
    names = Names(("c_fc", "up", Transpose()))
    weight = pieces(names, "c_fc.weight", stored.weight.detach(), Matrix(out=6))["out"]
    bias = pieces(names, "c_fc.bias", stored.bias.detach(), Matrix(out=6))["out"]
    torch.testing.assert_close(torch.nn.functional.linear(x, weight, bias), stored(x).detach())


def test_a_transposed_matrix_is_cut_by_its_columns() -> None:
    stored = numbered(3, 8)
    names = Names(("c_attn", "qkv", Split("q", "k", "v"), Transpose()))
    found = pieces(names, "c_attn.weight", stored, Matrix(q=4, k=2, v=2))
    assert torch.equal(found["q"], stored[:, :4].T)
    assert torch.equal(found["v"], stored[:, 6:].T)


def test_an_adapters_rows_are_cut_and_never_transposed() -> None:
    target = Names(("c_attn", "qkv", Transpose(), Split("q", "k"))).find("c_attn.weight")
    assert target is not None
    b = numbered(4, 2)
    found = dict(target.rows(b, Matrix(q=2, k=2)))
    assert torch.equal(found["q"], b[:2]) and torch.equal(found["k"], b[2:])


def interleave(q: Tensor, k: Tensor, v: Tensor, kv_heads: int, head_dim: int) -> Tensor:
    """[kv heads, queries of the group + k + v, head size], laid out by hand."""
    rows = []
    group = q.shape[0] // (kv_heads * head_dim)
    for head in range(kv_heads):
        rows += [q[row] for row in range(head * group * head_dim, (head + 1) * group * head_dim)]
        rows += [k[row] for row in range(head * head_dim, (head + 1) * head_dim)]
        rows += [v[row] for row in range(head * head_dim, (head + 1) * head_dim)]
    return torch.stack(rows)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 2), (6, 2, 4), (4, 1, 3), (1, 1, 1)])
@pytest.mark.parametrize("tail", [(), (5,)])
def test_interleaved_gathers_what_takes_turns_by_head_of_keys(
    heads: int, kv_heads: int, head_dim: int, tail: tuple[int, ...]
) -> None:
    q = torch.randn(heads * head_dim, *tail)
    k, v = torch.randn(2, kv_heads * head_dim, *tail)
    module = Matrix(unit=head_dim, q=len(q), k=len(k), v=len(v))
    fused = interleave(q, k, v, kv_heads, head_dim)
    found = pieces(Names(("wqkv", "qkv", Interleaved("q", "k", "v"))), "wqkv.weight", fused, module)
    assert torch.equal(found["q"], q) and torch.equal(found["k"], k) and torch.equal(found["v"], v)


def test_interleaved_with_a_unit_of_one_row_alternates_rows() -> None:
    found = pieces(Names(("up", "m", Interleaved("gate", "up"))), "up.bias", numbered(6), Matrix(gate=3, up=3))
    assert found["gate"].tolist() == [0, 2, 4] and found["up"].tolist() == [1, 3, 5]


@pytest.mark.parametrize(
    ("shape", "kv_heads", "cut"),
    [
        ({"multi_query": True}, 1, Split("q", "k", "v")),
        ({"multi_query": True}, 1, Interleaved("q", "k", "v")),
        ({"multi_query": False}, 4, Interleaved("q", "k", "v")),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, 2, Interleaved("q", "k", "v")),
    ],
)
def test_fused_layouts_are_read_as_transformers_reads_them(
    shape: dict[str, Any], kv_heads: int, cut: Split | Interleaved
) -> None:
    """One class of transformers knows three layouts of a fused projection."""
    from transformers import FalconConfig
    from transformers.models.falcon.modeling_falcon import FalconAttention

    heads, head_dim, width = 4, 8, 32
    config = FalconConfig(hidden_size=width, num_attention_heads=heads, num_hidden_layers=1, alibi=False, **shape)
    config._attn_implementation = "eager"
    reference = FalconAttention(config, layer_idx=0)
    x = torch.randn(1, 3, width)
    with torch.no_grad():
        weight = reference.query_key_value.weight.detach()
        q, k, v = (y.reshape(3, -1, head_dim) for y in reference._split_heads(reference.query_key_value(x)))
        module = Matrix(unit=head_dim, q=heads * head_dim, k=kv_heads * head_dim, v=kv_heads * head_dim)
        ours = pieces(Names(("query_key_value", "qkv", cut)), "query_key_value.weight", weight, module)
        torch.testing.assert_close((x[0] @ ours["q"].T).view(3, -1, head_dim), q)
        # The reference repeats a head of keys for each of its queries.
        repeat = k.shape[1] // kv_heads
        for part, expected in (("k", k), ("v", v)):
            mine = (x[0] @ ours[part].T).view(3, kv_heads, head_dim).repeat_interleave(repeat, 1)
            torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("shape", [(7, 3), (9, 3), (7,), ()])
@pytest.mark.parametrize("cut", [Split("q", "k", "v"), Interleaved("q", "k", "v")])
def test_a_fused_tensor_with_other_rows_than_the_parts_is_refused(shape: tuple[int, ...], cut: Split) -> None:
    names = Names(("wqkv", "qkv", cut))
    with pytest.raises(TensorMismatch, match=r"the model needs 8 \(q 4 \+ k 2 \+ v 2\)"):
        pieces(names, "wqkv.weight", torch.zeros(shape), Matrix(unit=2, q=4, k=2, v=2))


@pytest.mark.parametrize("parts", [{"unit": 2, "q": 5, "k": 4}, {"unit": 8, "q": 4, "k": 4}])
def test_parts_that_cannot_take_turns_are_refused(parts: dict[str, int]) -> None:
    rows = sum(parts.values()) - parts["unit"]
    with pytest.raises(TensorMismatch, match="take turns"):
        pieces(Names(("w", "m", Interleaved("q", "k"))), "w.weight", numbered(rows, 2), Matrix(**parts))


# Rows that cannot mean anything are the plugin's fault, and are named.


@pytest.mark.parametrize(
    "row",
    [
        ("layers.*.a", "layers.a.b.*.*"),
        ("layers.*.*.*", "layers.*"),
        ("layers.a*", "layers.b*"),
        ("layers.*", "layers.x*"),
        ("a", "b[q"),
        ("a", "b c"),
        ("a", ""),
        ("a", None, Transpose()),
        ("a", "b", Transpose(), Transpose()),
        ("a", "b", Split("q", "k"), Interleaved("q", "k")),
        ("a", "b[q]", Split("q", "k")),
        ("a", "b", Transpose),
    ],
)
def test_a_row_that_cannot_mean_anything_is_refused_with_its_source(row: tuple[object, ...]) -> None:
    with pytest.raises(PluginBroken, match=str(row[0]).replace("*", r"\*")):
        Names(row)  # type: ignore[arg-type]


@pytest.mark.parametrize("parts", [(), ("q",), ("q", "q")])
def test_a_cut_needs_two_different_parts(parts: tuple[str, ...]) -> None:
    with pytest.raises(PluginBroken, match="two or more different parts"):
        Split(*parts)


def test_an_optional_prefix_that_no_row_has_is_refused() -> None:
    with pytest.raises(PluginBroken, match=r"'transformer\.'"):
        DECODER.optional("transformer.")


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (Names(("w", "m")), r"leads to m without a \[part\].*q, k"),
        (Names(("w", "m[z]")), "the part 'z' of m; it has q, k"),
        (Names(("w", "m", Split("q", "z"))), "the part 'z' of m; it has q, k"),
    ],
)
def test_a_row_that_names_no_part_of_a_fused_module_is_refused(names: Names, complaint: str) -> None:
    target = names.find("w.weight")
    assert isinstance(target, Target)
    with pytest.raises(PluginBroken, match=complaint):
        target.parts(Matrix(q=2, k=2))


def test_operations_spell_themselves_as_they_are_written() -> None:
    operations = (Transpose(), Split("q", "k"), Interleaved("gate", "up"))
    assert repr(operations) == "(Transpose(), Split('q', 'k'), Interleaved('gate', 'up'))"


# The reverse: what a checkpoint should have held.


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (("embed", "out", "weight", None), ["model.embed_tokens.weight"]),
        (("layers.7.mixer.qkv", "q", "weight", None), ["model.layers.7.self_attn.q_proj.weight"]),
        (
            ("layers.7.mixer.qkv", "q", "bias", None),
            ["model.layers.7.self_attn.q_proj.bias", "model.layers.7.attn.in_proj_bias"],
        ),
        (("layers.7.mixer.qkv", "k", "bias", None), ["model.layers.7.attn.in_proj_bias"]),
        (("layers.7.mixer.conv_bias", "out", "weight", None), ["model.layers.7.mamba.conv1d.bias"]),
        (("layers.7.ffn.experts.gate_up", "gate", "weight", 3), ["model.layers.7.moe.experts.3.w1.weight"]),
        (("layers.7.ffn.experts.gate_up", "gate", "weight", None), []),
        (("layers.7.ffn.experts.gate_up", "up", "weight", 3), []),
        (("layers.x.mixer.qkv", "q", "weight", None), []),
        (("norm", "out", "weight", None), []),
    ],
)
def test_the_sources_of_a_place_are_the_names_that_lead_there(
    at: tuple[str, str, str, int | None], expected: list[str]
) -> None:
    assert DECODER.sources(*at) == expected


def test_every_source_that_is_offered_leads_to_the_place_it_is_offered_for() -> None:
    for at in (("layers.7.mixer.qkv", "q", "bias", None), ("layers.7.ffn.experts.gate_up", "gate", "weight", 3)):
        for source in DECODER.sources(*at):
            path, part, suffix, index = place(DECODER, source)
            assert (path, part or "q", suffix, index) == at
