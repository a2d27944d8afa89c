"""fill: every tensor has one place, every place its tensor, and whatever does not add up is named."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bestiary.checkpoint import Checkpoint, Interleaved, Names, Place, Split, Stacked, Transpose, fill
from bestiary.errors import CheckpointMalformed, PluginBroken, TensorMismatch


class Leaf:
    """A fused matrix that keeps what it is given, after the checks that a real leaf makes."""

    def __init__(self, inputs: int, *, unit: int = 1, bias: bool = False, experts: int = 0, **parts: int) -> None:
        self.parts, self.unit, self.inputs = parts, unit, inputs
        self.suffixes = ["weight", "bias"] if bias else ["weight"]
        self.experts = self.stack = experts
        self.filled: dict[tuple[str | None, str, int | None], Tensor] = {}

    def expected(self) -> Iterable[Place]:
        for suffix in self.suffixes:
            for part in self.parts:
                if self.experts:
                    yield from ((part, suffix, number) for number in range(self.experts))
                else:
                    yield part, suffix

    def fill(self, part: str | None, suffix: str, tensor: Tensor, index: int | None) -> None:
        if suffix not in self.suffixes:
            raise TensorMismatch(f"the model has no {suffix!r} here")
        rows = self.parts[part or "out"]
        needed = [rows, self.inputs] if suffix == "weight" else [rows]
        if list(tensor.shape) != needed:
            raise TensorMismatch(f"found {list(tensor.shape)}, the model needs {needed}")
        self.filled[part, suffix, index] = tensor.clone()


class Tied(Leaf):
    """A head that reads another's table: it needs nothing, and ignores a copy."""

    def expected(self) -> Iterable[Place]:
        return ()

    def fill(self, part: str | None, suffix: str, tensor: Tensor, index: int | None) -> None:
        pass


NAMES = Names(
    ("model.embed", "embed"),
    ("model.layers.*.q_proj", "layers.*.qkv[q]"),
    ("model.layers.*.k_proj", "layers.*.qkv[k]"),
    ("model.layers.*.v_proj", "layers.*.qkv[v]"),
    ("model.layers.*.inv_freq", None),
    ("model.layers.*.experts.*.up", "layers.*.up[out]"),
    ("model.layers.*.wqkv", "layers.*.qkv", Split("q", "k", "v")),
    ("lm_head", "head"),
)


def qkv() -> Leaf:
    return Leaf(3, unit=2, bias=True, q=4, k=2, v=2)


def tree() -> dict[str, Leaf]:
    return {"embed": Leaf(3, out=5), "layers.0.qkv": qkv(), "layers.1.qkv": qkv(), "head": Tied(3, out=5)}


def tensors() -> dict[str, Tensor]:
    found = {"model.embed.weight": torch.randn(5, 3)}
    for layer in range(2):
        for part, rows in (("q", 4), ("k", 2), ("v", 2)):
            found[f"model.layers.{layer}.{part}_proj.weight"] = torch.randn(rows, 3)
            found[f"model.layers.{layer}.{part}_proj.bias"] = torch.randn(rows)
    return found


def pour(folder: Path, tensors: dict[str, Tensor], tree: dict[str, Leaf], names: Names = NAMES, *away: str) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    with Checkpoint.open(folder) as checkpoint:
        fill(tree, names, checkpoint, lambda path: path in away)


def refusal(folder: Path, tensors: dict[str, Tensor], tree: dict[str, Leaf], names: Names = NAMES) -> str:
    with pytest.raises(TensorMismatch) as caught:
        pour(folder, tensors, tree, names)
    return str(caught.value)


def test_every_tensor_reaches_its_place_with_its_values(tmp_path: Path) -> None:
    stored, model = tensors(), tree()
    pour(tmp_path, stored, model)
    assert torch.equal(model["embed"].filled["out", "weight", None], stored["model.embed.weight"])
    for layer in range(2):
        for part in "qkv":
            for suffix in ("weight", "bias"):
                expected = stored[f"model.layers.{layer}.{part}_proj.{suffix}"]
                assert torch.equal(model[f"layers.{layer}.qkv"].filled[part, suffix, None], expected)


@pytest.mark.parametrize("cut", [Split("q", "k", "v"), Interleaved("q", "k", "v")])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_fused_tensor_fills_all_its_parts(tmp_path: Path, cut: Split, transposed: bool) -> None:
    weight = torch.randn(8, 3)
    bias = torch.randn(8)
    names = Names(("wqkv", "qkv", Transpose(), cut) if transposed else ("wqkv", "qkv", cut))
    model = {"qkv": qkv()}
    pour(tmp_path, {"wqkv.weight": weight.T if transposed else weight, "wqkv.bias": bias}, model, names)
    # One head of keys, so that both ways of fusing lay q, k and v below each other.
    assert torch.equal(model["qkv"].filled["q", "weight", None], weight[:4])
    assert torch.equal(model["qkv"].filled["v", "weight", None], weight[6:])
    assert torch.equal(model["qkv"].filled["k", "bias", None], bias[4:6])


def test_experts_are_stacked_by_their_number(tmp_path: Path) -> None:
    stored = {f"model.layers.0.experts.{i}.up.weight": torch.randn(2, 3) for i in range(12)}
    model = {"layers.0.up": Leaf(3, out=2, experts=12)}
    pour(tmp_path, stored, model)
    for i in range(12):
        assert torch.equal(
            model["layers.0.up"].filled["out", "weight", i], stored[f"model.layers.0.experts.{i}.up.weight"]
        )


def test_one_missing_expert_is_missed_by_its_number(tmp_path: Path) -> None:
    stored = {f"model.layers.0.experts.{i}.up.weight": torch.randn(2, 3) for i in (0, 2)}
    text = refusal(tmp_path, stored, {"layers.0.up": Leaf(3, out=2, experts=3)})
    assert "'model.layers.0.experts.1.up.weight' (for layers.0.up[out]:weight of expert 1)" in text


def test_a_dropped_buffer_and_a_tied_heads_copy_fill_nothing(tmp_path: Path) -> None:
    stored = tensors() | {"model.layers.0.inv_freq": torch.ones(2), "lm_head.weight": torch.ones(5, 3)}
    model = tree()
    pour(tmp_path, stored, model)
    assert model["head"].filled == {}


def test_what_another_rank_has_is_skipped(tmp_path: Path) -> None:
    model = tree()
    del model["layers.1.qkv"]
    pour(tmp_path, tensors(), model, NAMES, "layers.1.qkv")
    assert len(model["layers.0.qkv"].filled) == 6


def test_tensors_that_no_row_speaks_of_are_listed(tmp_path: Path) -> None:
    text = refusal(tmp_path, tensors() | {"model.layers.0.gate": torch.ones(1)}, tree())
    assert str(tmp_path) in text
    assert "1 tensor that no row of the plugin's NAMES speaks of:\n  'model.layers.0.gate'" in text


def test_of_many_faults_ten_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    text = refusal(tmp_path, tensors() | {f"extra.{i:03}": torch.ones(1) for i in range(250)}, tree())
    assert "250 tensors that no row" in text and "... and 240 more" in text
    assert text.count("'extra.") == 10


def test_a_place_that_the_model_does_not_have_is_named_with_its_tensor(tmp_path: Path) -> None:
    text = refusal(tmp_path, tensors() | {"model.layers.2.q_proj.weight": torch.ones(4, 3)}, tree())
    assert "the model has no place for:\n  'model.layers.2.q_proj.weight' (for layers.2.qkv)" in text


def test_a_missing_tensor_is_named_as_the_checkpoint_would_spell_it(tmp_path: Path) -> None:
    stored = tensors()
    del stored["model.layers.1.k_proj.bias"], stored["model.embed.weight"]
    text = refusal(tmp_path, stored, tree())
    assert "2 tensors that the model needs, and the checkpoint lacks:" in text
    assert "  'model.embed.weight' (for embed[out]:weight)" in text
    assert "'model.layers.1.k_proj.bias' or 'model.layers.1.wqkv.bias' (for layers.1.qkv[k]:bias)" in text


def test_a_place_that_no_row_leads_to_is_said_to_have_none(tmp_path: Path) -> None:
    text = refusal(tmp_path, tensors(), tree() | {"norm": Leaf(3, out=1)})
    assert "what no row of NAMES leads to (for norm[out]:weight)" in text


def test_two_tensors_for_one_place_are_both_named(tmp_path: Path) -> None:
    stored = tensors() | {"model.layers.0.wqkv.weight": torch.ones(8, 3)}
    text = refusal(tmp_path, stored, tree())
    assert "3 tensors that the checkpoint has twice" in text
    assert re.search(r"'model\.layers\.0\.(q_proj|wqkv)\.weight' and '.*' \(for layers\.0\.qkv\[q\]:weight\)", text)


def test_all_kinds_of_faults_are_in_one_error_and_nothing_is_written_before(tmp_path: Path) -> None:
    stored = tensors() | {"odd": torch.ones(1), "model.layers.9.q_proj.weight": torch.ones(4, 3)}
    del stored["model.embed.weight"]
    model = tree()
    text = refusal(tmp_path, stored, model)
    assert all(word in text for word in ("'odd'", "layers.9", "'model.embed.weight'"))
    assert all(leaf.filled == {} for leaf in model.values())


@pytest.mark.parametrize(
    ("name", "shape", "complaint"),
    [
        ("model.embed.weight", (5, 4), r"found \[5, 4\], the model needs \[5, 3\]"),
        ("model.embed.weight", (15,), r"found \[15\], the model needs \[5, 3\]"),
        ("model.layers.0.q_proj.weight", (5, 3), r"found \[5, 3\], the model needs \[4, 3\]"),
    ],
)
def test_a_misshapen_tensor_is_named_with_both_shapes(
    tmp_path: Path, name: str, shape: tuple[int, ...], complaint: str
) -> None:
    text = refusal(tmp_path, tensors() | {name: torch.ones(shape)}, tree())
    assert str(tmp_path / "model.safetensors") in text
    assert f"{name!r}, float32 {list(shape)}, does not fit" in text
    assert re.search(complaint, text)


def test_a_fused_tensor_of_other_rows_is_named_with_what_the_parts_need(tmp_path: Path) -> None:
    names = Names(("wqkv", "qkv", Split("q", "k", "v")))
    stored = {"wqkv.weight": torch.ones(9, 3), "wqkv.bias": torch.ones(8)}
    text = refusal(tmp_path, stored, {"qkv": qkv()}, names)
    assert "'wqkv.weight', float32 [9, 3], does not fit qkv: it has 9 rows, and the model needs 8" in text


def test_a_tensor_of_a_kind_that_the_leaf_does_not_have_is_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path, tensors() | {"model.embed.bias": torch.ones(5)}, tree())
    assert "'model.embed.bias'" in text and "the model has no 'bias' here" in text


def test_a_row_that_no_module_can_follow_is_the_plugins_fault(tmp_path: Path) -> None:
    with pytest.raises(PluginBroken, match="leads to qkv without"):
        pour(tmp_path, {"wqkv.weight": torch.ones(8, 3)}, {"qkv": qkv()}, Names(("wqkv", "qkv")))


def test_values_are_taken_as_they_are_not_a_number_among_them(tmp_path: Path) -> None:
    weight = torch.full((5, 3), torch.nan)
    weight[0, 0], weight[0, 1] = torch.inf, -torch.inf
    model = tree()
    pour(tmp_path, tensors() | {"model.embed.weight": weight}, model)
    assert torch.equal(model["embed"].filled["out", "weight", None].view(torch.int32), weight.view(torch.int32))


class Watched(Checkpoint):
    """A checkpoint that writes down what is asked of it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[str] = []

    def tensor(self, name: str) -> Tensor:
        self.seen.append(f"read {name}")
        return super().tensor(name)

    def release(self, name: str) -> None:
        self.seen.append(f"let go {name}")
        super().release(name)


def test_tensors_are_poured_in_file_order_and_let_go_one_by_one(tmp_path: Path) -> None:
    save_file(tensors() | {"model.layers.0.inv_freq": torch.ones(2)}, tmp_path / "model.safetensors")
    with Watched.open(tmp_path) as checkpoint:
        fill(tree(), NAMES, checkpoint, lambda path: False)
    order = [name for name in checkpoint if not name.endswith("inv_freq")]
    assert checkpoint.seen == [f"{verb} {name}" for name in order for verb in ("read", "let go")]


def test_a_damaged_checkpoint_is_refused_before_the_model_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointMalformed), Checkpoint.open(tmp_path) as checkpoint:
        fill(tree(), NAMES, checkpoint, lambda path: False)


# ---- stacks of experts in one tensor ---------------------------------------------------------------------------------

STACKS = Names(
    ("experts.*.gate", "ffn[gate]"),
    ("experts.*.up", "ffn[up]"),
    ("experts.gate_up", "ffn:weight", Stacked(), Split("gate", "up")),
    ("turned", "ffn:weight", Stacked(), Transpose(), Split("gate", "up")),
)


@pytest.mark.parametrize("name", ["experts.gate_up", "turned"])
def test_a_stack_of_experts_in_one_tensor_is_taken_apart(name: str, tmp_path: Path) -> None:
    stack = torch.arange(3 * 5 * 4.0).view(3, 5, 4)
    stored = {name: stack.mT.contiguous() if name == "turned" else stack}
    leaf = Leaf(4, experts=3, gate=2, up=3)
    save_file(stored, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        fill({"ffn": leaf}, STACKS, checkpoint, elsewhere=lambda path: False)
    for number in range(3):
        assert torch.equal(leaf.filled["gate", "weight", number], stack[number, :2])
        assert torch.equal(leaf.filled["up", "weight", number], stack[number, 2:])


def test_a_stack_of_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    save_file({"experts.gate_up": torch.zeros(2, 5, 4)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(TensorMismatch, match="stacks 3 experts"):
        fill({"ffn": Leaf(4, experts=3, gate=2, up=3)}, STACKS, checkpoint, elsewhere=lambda path: False)


def test_experts_one_by_one_and_all_at_once_are_one_too_many(tmp_path: Path) -> None:
    each = {
        f"experts.{i}.{part}.weight": torch.zeros(rows, 4) for i in range(3) for part, rows in (("gate", 2), ("up", 3))
    }
    save_file({**each, "experts.gate_up": torch.zeros(3, 5, 4)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(TensorMismatch, match="the checkpoint has twice"):
        fill({"ffn": Leaf(4, experts=3, gate=2, up=3)}, STACKS, checkpoint, elsewhere=lambda path: False)


def test_what_a_stack_lacks_is_named_in_both_spellings(tmp_path: Path) -> None:
    save_file({"experts.0.gate.weight": torch.zeros(2, 4)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(TensorMismatch) as caught:
        fill({"ffn": Leaf(4, experts=2, gate=2, up=3)}, STACKS, checkpoint, elsewhere=lambda path: False)
    assert "'experts.1.gate.weight' or 'experts.gate_up'" in str(caught.value)
