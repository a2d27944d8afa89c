"""Checkpoint: a folder of safetensors files. Written by the safetensors package, the oracle for damage too."""

import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors import torch as oracle
from torch import Tensor

from bestiary.checkpoint import Checkpoint
from bestiary.errors import CheckpointMalformed, CheckpointNotFound

DTYPES = [
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2",
    "int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool",
]
SOME = {"b": torch.arange(6, dtype=torch.float32).view(2, 3), "a": torch.ones(5, dtype=torch.bfloat16)}


def save(folder: Path, tensors: dict[str, Tensor], name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    oracle.save_file(tensors, folder / name, metadata={"format": "pt"})
    return folder


def save_shards(folder: Path, shards: dict[str, dict[str, Tensor]], **index: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, tensors in shards.items():
        oracle.save_file(tensors, folder / name)
    weight_map = {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map} | index))
    return folder


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with any header, as JSON unless it is bytes already."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: Any = (1,), begin: Any = 0, end: Any = 4, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit: NaN and signs of zero included."""
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


# Reading what is well.


@pytest.mark.parametrize("dtype", " ".join(DTYPES).split())
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0,), (2, 0, 3)])
def test_every_dtype_and_shape_is_read_as_the_safetensors_package_reads_it(
    tmp_path: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    count = torch.Size(shape).numel()
    values = (torch.arange(count) % 2).to(getattr(torch, dtype)).view(shape)
    save(tmp_path, {"x": values, "y": torch.ones(3)})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert same(checkpoint.tensor("x"), oracle.load_file(tmp_path / "model.safetensors")["x"])
        assert (checkpoint.dtype("x"), checkpoint.shape("x")) == (dtype, shape)


def test_a_checkpoint_says_what_it_holds_without_reading_it(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save(tmp_path, SOME))
    assert sorted(checkpoint.names()) == ["a", "b"] == sorted(checkpoint)
    assert len(checkpoint) == 2 and "a" in checkpoint and "c" not in checkpoint
    assert checkpoint.nbytes == 6 * 4 + 5 * 2
    assert checkpoint.file("a") == tmp_path / "model.safetensors"
    for method in (checkpoint.shape, checkpoint.dtype, checkpoint.file, checkpoint.tensor, checkpoint.release):
        with pytest.raises(KeyError):
            method("c")


def test_a_file_without_tensors_is_an_empty_checkpoint(tmp_path: Path) -> None:
    assert Checkpoint.open(save(tmp_path, {})).names() == []


def test_tensors_come_in_the_order_in_which_they_lie_in_the_file(tmp_path: Path) -> None:
    header = {"first": entry((1,), 4, 8), "second": entry((1,), 0, 4), "third": entry((2,), 8, 16)}
    (tmp_path / "model.safetensors").write_bytes(raw(header, struct.pack("<4f", 1, 2, 3, 4)))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.names() == ["second", "first", "third"]
    assert [checkpoint.tensor(name).tolist() for name in checkpoint] == [[1], [2], [3, 4]]


def test_a_tensor_is_a_view_of_the_file_and_not_a_copy(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save(tmp_path, SOME))
    assert checkpoint.tensor("b").data_ptr() == checkpoint.tensor("b").data_ptr()


def test_writing_to_a_view_does_not_reach_the_file(tmp_path: Path) -> None:
    before = (save(tmp_path, SOME) / "model.safetensors").read_bytes()
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.tensor("b").zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16"])
def test_a_tensor_that_lies_askew_is_read_all_the_same(tmp_path: Path, dtype: str) -> None:
    """The format aligns nothing: a header of odd length puts every number at an odd address."""
    width, torch_dtype = {"F64": (8, torch.float64), "F32": (4, torch.float32), "BF16": (2, torch.bfloat16)}[dtype]
    values = torch.randn(3).to(torch_dtype)
    header = json.dumps({"x": entry((3,), 0, 3 * width, dtype)}).encode()
    for padding in range(4):
        data = values.view(torch.uint8).numpy().tobytes()
        (tmp_path / "model.safetensors").write_bytes(raw(header + b" " * padding, data))
        found = Checkpoint.open(tmp_path).tensor("x")
        assert same(found, values) and found.data_ptr() % width == 0


def test_views_outlive_the_checkpoint_and_their_release(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(100, 100) for i in range(4)}
    with Checkpoint.open(save(tmp_path, tensors)) as checkpoint:
        views = {name: checkpoint.tensor(name) for name in checkpoint}
        for name in checkpoint:
            checkpoint.release(name)
    del checkpoint
    assert all(same(views[name], tensors[name]) for name in tensors)


def test_a_closed_checkpoint_knows_its_names_and_gives_no_tensors(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save(tmp_path, SOME))
    checkpoint.close()
    checkpoint.close()
    checkpoint.release("a")
    assert sorted(checkpoint.names()) == ["a", "b"]
    with pytest.raises(ValueError, match="closed"):
        checkpoint.tensor("a")


def test_the_files_are_let_go_when_the_last_tensor_is(tmp_path: Path) -> None:
    save(tmp_path, SOME)

    def mapped() -> bool:
        return str(tmp_path / "model.safetensors") in Path("/proc/self/maps").read_text()

    with Checkpoint.open(tmp_path) as checkpoint:
        view = checkpoint.tensor("a")
    assert mapped()
    del view
    assert not mapped()


def test_releasing_what_was_copied_keeps_memory_near_one_tensor(tmp_path: Path) -> None:
    size = 8 << 20
    save(tmp_path, {f"t{i}": torch.zeros(size, dtype=torch.uint8) for i in range(8)})

    def resident_bytes() -> int:
        smaps = Path("/proc/self/smaps").read_text().split(str(tmp_path / "model.safetensors"))[1]
        return int(smaps.split("Rss:")[1].split()[0]) * 1024

    checkpoint = Checkpoint.open(tmp_path)
    for name in checkpoint:
        checkpoint.tensor(name).sum()
    assert resident_bytes() > 7 * size
    for name in checkpoint:
        checkpoint.release(name)
    assert resident_bytes() < size
    for name in checkpoint:
        checkpoint.tensor(name).sum()
        checkpoint.release(name)
        assert resident_bytes() < size


# Which files.


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    save_shards(tmp_path, {f"s-{i}.safetensors": {f"t{i}": torch.full((2,), i)} for i in reversed(range(8))})
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.names() == [f"t{i}" for i in range(8)]
    assert [checkpoint.tensor(name).tolist() for name in checkpoint] == [[i, i] for i in range(8)]
    assert checkpoint.file("t3").name == "s-3.safetensors"


def test_a_shards_tensor_that_the_index_forgets_is_part_of_the_checkpoint(tmp_path: Path) -> None:
    shards = {"s.safetensors": {"a": torch.ones(2), "b": torch.zeros(1)}}
    save_shards(tmp_path, shards, weight_map={"a": "s.safetensors"})
    assert sorted(Checkpoint.open(tmp_path).names()) == ["a", "b"]


def test_a_single_file_goes_before_an_index_and_other_files(tmp_path: Path) -> None:
    save_shards(tmp_path, {"s.safetensors": {"a": torch.ones(2)}})
    save(tmp_path, {"b": torch.ones(1)})
    save(tmp_path, {"c": torch.ones(1)}, "consolidated.safetensors")
    assert Checkpoint.open(tmp_path).names() == ["b"]


def test_without_the_usual_names_every_safetensors_file_counts(tmp_path: Path) -> None:
    save(tmp_path, {"b": torch.ones(1)}, "part-2.safetensors")
    save(tmp_path, {"a": torch.ones(1)}, "part-1.safetensors")
    assert Checkpoint.open(tmp_path).names() == ["a", "b"]


def test_files_may_be_links_into_a_cache(tmp_path: Path) -> None:
    blob = save(tmp_path / "blobs", SOME, "0123abcd") / "0123abcd"
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(blob)
    assert same(Checkpoint.open(tmp_path / "snapshot").tensor("b"), SOME["b"])


def test_a_tensor_in_two_files_is_refused_with_both(tmp_path: Path) -> None:
    save(tmp_path, {"x": torch.ones(1)}, "fp16.safetensors")
    save(tmp_path, {"x": torch.ones(1)}, "fp32.safetensors")
    with pytest.raises(CheckpointMalformed, match=r"'x' is in both fp16\.safetensors and fp32\.safetensors"):
        Checkpoint.open(tmp_path)


def test_another_checkpoints_tensors_stand_behind_a_prefix_and_never_before_ones_own(tmp_path: Path) -> None:
    own, other = {"text.a": torch.ones(2), "b": torch.ones(1)}, {"m.a": torch.zeros(2), "m.b.c": torch.zeros(3)}
    with Checkpoint.open(save(tmp_path / "own", own)) as checkpoint:
        checkpoint.adopt(Checkpoint.open(save(tmp_path / "other", other | {"n.d": torch.zeros(4)})), "text.", "m.")
        assert sorted(checkpoint) == ["b", "text.a", "text.b.c"] and len(checkpoint) == 3
        assert same(checkpoint.tensor("text.a"), own["text.a"])
        assert same(checkpoint.tensor("text.b.c"), other["m.b.c"])
        assert checkpoint.file("text.b.c") == tmp_path / "other" / "model.safetensors"
        assert (checkpoint.shape("text.b.c"), checkpoint.nbytes) == ((3,), (2 + 1 + 3) * 4)
        checkpoint.release("text.b.c")
        assert same(checkpoint.tensor("text.b.c"), other["m.b.c"])
    with pytest.raises(ValueError, match="closed"):
        checkpoint.tensor("text.b.c")


def test_several_checkpoints_may_be_adopted_and_their_files_are_let_go_with_ones_own(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save(tmp_path / "own", {"a": torch.ones(1)}))
    for name in ("x", "y"):
        checkpoint.adopt(Checkpoint.open(save(tmp_path / name, SOME)), f"{name}.")
    assert sorted(checkpoint) == ["a", "x.a", "x.b", "y.a", "y.b"]
    assert all(same(checkpoint.tensor(f"{name}.{key}"), SOME[key]) for name in ("x", "y") for key in SOME)
    checkpoint.close()
    mapped = Path("/proc/self/maps").read_text()
    assert not any(str(tmp_path / name) in mapped for name in ("own", "x", "y"))


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path: Path) -> None:
    save_shards(tmp_path, {"s-1.safetensors": {"a": torch.ones(1)}, "s-2.safetensors": {"b": torch.ones(1)}})
    (tmp_path / "s-2.safetensors").unlink()
    with pytest.raises(CheckpointMalformed, match=r"s-2\.safetensors is missing.*download it again"):
        Checkpoint.open(tmp_path)


def test_an_index_that_puts_a_tensor_into_a_shard_without_it_is_refused(tmp_path: Path) -> None:
    save_shards(tmp_path, {"s.safetensors": {"a": torch.ones(1)}}, weight_map={"z": "s.safetensors"})
    with pytest.raises(CheckpointMalformed, match=r"'z' is in s\.safetensors, which does not hold it"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/s.safetensors",
        "..\\secret.safetensors",
        "s\0.safetensors",
        "s\ud800.safetensors",
        "pytorch_model.bin",
        "..",
        "",
        3,
        None,
        ["s.safetensors"],
    ],
)
def test_an_index_may_only_name_plain_safetensors_files(tmp_path: Path, shard: Any) -> None:
    folder = save_shards(tmp_path / "model", {"s.safetensors": {"a": torch.ones(1)}}, weight_map={"a": shard})
    save(tmp_path, {"a": torch.ones(1)}, "secret.safetensors")
    with pytest.raises(CheckpointMalformed, match="not the plain name"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], "s.safetensors"])
def test_an_index_without_a_map_is_refused(tmp_path: Path, weight_map: Any) -> None:
    save_shards(tmp_path, {"s.safetensors": {"a": torch.ones(1)}}, weight_map=weight_map)
    with pytest.raises(CheckpointMalformed, match="no weight_map"):
        Checkpoint.open(tmp_path)


def test_a_shards_name_that_the_system_refuses_is_an_error_that_says_so(tmp_path: Path) -> None:
    save_shards(tmp_path, {"s.safetensors": {"a": torch.ones(1)}}, weight_map={"a": "x" * 5000 + ".safetensors"})
    with pytest.raises(CheckpointNotFound, match="cannot be read"):
        Checkpoint.open(tmp_path)


def test_a_folder_without_weights_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"holds no \*\.safetensors file"):
        Checkpoint.open(tmp_path)
    for path in (tmp_path / "nowhere", save(tmp_path, SOME) / "model.safetensors"):
        with pytest.raises(CheckpointNotFound, match="is not a folder"):
            Checkpoint.open(path)


@pytest.mark.parametrize("name", ["pytorch_model-00001-of-00002.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickles_are_named_explained_and_not_opened(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)  # opening it would hang
    with pytest.raises(CheckpointNotFound, match=r"can run any code.*safe_serialization=True") as caught:
        Checkpoint.open(tmp_path)
    assert name in str(caught.value)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("gone")])
def test_a_weights_file_that_is_no_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointMalformed, match=r"model\.safetensors is (not a file|missing)"):
        Checkpoint.open(tmp_path)


# Damage.

GOOD = {"x": entry()}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "0 bytes, fewer than the start of a header"),
        (b"\x02\0\0", "3 bytes, fewer"),
        (raw({}, length=2)[:9], "its header has 2 bytes"),
        (raw(GOOD, b"\0" * 4, length=2**63), "its header has 9223372036854775808 bytes"),
        (raw(GOOD, b"\0" * 4, length=2**64 - 1), "its header has"),
        (raw(GOOD, b"\0" * 4, length=0), "its header has 0 bytes"),
        (raw(b"{", b"\0" * 4, length=1), "its header has 1 bytes"),
        (raw(GOOD, b"\0" * 4, length=1000), "its header has 1000 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer.*git lfs pull"),
        (raw(b"not json", b""), "its header is not valid JSON"),
        (raw(b'{"x": "\xff"}', b""), "its header is not valid JSON"),
        (raw(b"[]", b""), "its header must be a JSON object"),
        (raw(b"[" * 100_000, b""), "its header is nested too deeply"),
        (raw(b'{"x": ' + json.dumps(entry()).encode() + b', "x": 1}', b"\0" * 4), "'x' stands twice"),
        (raw(b'{"x": {"dtype": "F32", "dtype": "F32"}}', b""), "'dtype' stands twice"),
        (raw(GOOD | {"__metadata__": {"a": 1}}, b"\0" * 4), "__metadata__"),
        (raw(GOOD | {"__metadata__": []}, b"\0" * 4), "__metadata__"),
        (raw({"x": []}), "tensor 'x' must have"),
        (raw({"x": {"dtype": "F32", "shape": [1]}}, b"\0" * 4), "tensor 'x' must have"),
        (raw({"x": entry() | {"more": 1}}, b"\0" * 4), "tensor 'x' must have"),
        (raw({"\ud800": entry()}, b"\0" * 4), r"tensor '\\ud800' has a name that is no text"),
        (raw({"x": entry(dtype="F3")}, b"\0" * 4), "tensor 'x' has the dtype 'F3', and this version reads F64, F32"),
        (raw({"x": entry(dtype=["F32"])}, b"\0" * 4), "tensor 'x' has the dtype"),
        (raw({"x": entry(shape="1")}, b"\0" * 4), "tensor 'x' has the shape '1'"),
        (raw({"x": entry(shape=(-1,))}, b"\0" * 4), r"tensor 'x' has the shape \[-1\]"),
        (raw({"x": entry(shape=(1.0,))}, b"\0" * 4), r"tensor 'x' has the shape \[1.0\]"),
        (raw({"x": entry(shape=(True,))}, b"\0" * 4), r"tensor 'x' has the shape \[True\]"),
        (raw({"x": entry(shape=(1,) * 65)}, b"\0" * 4), "tensor 'x' has the shape"),
        (raw({"x": entry(shape=(2**62, 2**62), end=0)}), "tensor 'x' has the shape"),
        (raw({"x": entry(shape=(0, 2**62, 2), end=0)}), "tensor 'x' has the shape"),
        (raw({"x": entry(shape=(2**63,), end=0)}), "tensor 'x' has the shape"),
        (raw({"x": entry() | {"data_offsets": [0]}}, b"\0" * 4), "tensor 'x' has the data_offsets"),
        (raw({"x": entry() | {"data_offsets": 4}}, b"\0" * 4), "tensor 'x' has the data_offsets"),
        (raw({"x": entry(begin=4, end=0)}, b"\0" * 4), r"tensor 'x' has the data_offsets \[4, 0\]"),
        (raw({"x": entry(begin=-4, end=0)}, b"\0" * 4), "tensor 'x' has the data_offsets"),
        (raw({"x": entry(begin=0.0)}, b"\0" * 4), "tensor 'x' has the data_offsets"),
        (raw({"x": entry(end=8)}, b"\0" * 8), r"'x' takes 4 bytes as F32 \[1\], its data_offsets are \[0, 8\]"),
        (raw({"x": entry(shape=())}, b"\0" * 3), "tensor 'x' needs the file to have"),
        (raw({"x": entry(), "y": entry((2,), 4, 12)}, b"\0" * 11), "tensor 'y' needs the file to have"),
        (raw({"x": entry(), "y": entry((1,), 2, 6)}, b"\0" * 6), "tensor 'y' overlaps"),
        (raw({"x": entry(), "y": entry()}, b"\0" * 4), "tensor 'y' overlaps"),
        (raw({"x": entry(), "y": entry((1,), 5, 9)}, b"\0" * 9), "tensor 'y' begins after a hole"),
        (raw({"x": entry((1,), 1, 5)}, b"\0" * 5), "tensor 'x' begins after a hole"),
        (raw(GOOD, b"\0" * 5), "1 bytes that belong to no tensor"),
        (raw({}, b"\0"), "1 bytes that belong to no tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_file_is_refused_with_its_name_and_its_fault(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointMalformed, match=complaint) as caught:
        Checkpoint.open(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_header_beyond_the_formats_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", 100_000_001))
        stream.truncate(1 << 30)  # sparse
    with pytest.raises(CheckpointMalformed, match="its header has 100000001 bytes"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("damaged", ["model.safetensors", "model.safetensors.index.json"])
def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path, damaged: str) -> None:
    if damaged == "model.safetensors":
        content = (save(tmp_path, SOME) / damaged).read_bytes()
    else:
        content = (save_shards(tmp_path, {"s.safetensors": SOME}) / damaged).read_bytes()
    Checkpoint.open(tmp_path)
    for length in range(len(content)):
        (tmp_path / damaged).write_bytes(content[:length])
        with pytest.raises(CheckpointMalformed):
            Checkpoint.open(tmp_path)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes after one to three accidents."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "set", "drop", "insert", "cut", "repeat"]))
        if kind == "flip":
            content[at : at + 1] = bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in content[at : at + 1])
        elif kind == "set":
            content[at : at + 1] = draw(st.sampled_from([b"%c" % byte for byte in b'0123456789[]{},:" \\-.eE\0\xff']))
        elif kind == "drop":
            del content[at : at + draw(st.integers(1, 8))]
        elif kind == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "cut":
            del content[at:]
        else:
            content[at:at] = content[at : at + draw(st.integers(1, 40))]
    return bytes(content)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(damaged(oracle.save(SOME, metadata={"format": "pt"})))
def test_whatever_is_accepted_holds_what_the_safetensors_package_finds_in_it(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").write_bytes(content)
        try:
            checkpoint = Checkpoint.open(Path(folder))
        except CheckpointMalformed:
            return
        found = {name: checkpoint.tensor(name) for name in checkpoint}
        assert all(found[name].reshape(-1).view(torch.uint8).int().sum() >= 0 for name in found)
        try:
            expected = oracle.load(content)
        except SafetensorError as error:
            assert b"-0" in content, error  # to Python it is zero, to the package no natural number
            return
        assert found.keys() == expected.keys()
        assert all(same(found[name], expected[name]) for name in found)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(damaged(b'{"metadata": {}, "weight_map": {"a": "s1.safetensors", "b": "s2.safetensors"}}'))
def test_a_damaged_index_gives_the_same_tensors_or_a_typed_error(index: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        shards = {"s1.safetensors": {"a": torch.ones(2)}, "s2.safetensors": {"b": torch.ones(1)}}
        folder = save_shards(Path(name), shards)
        (folder / "model.safetensors.index.json").write_bytes(index)
        try:
            checkpoint = Checkpoint.open(folder)
        except (CheckpointMalformed, CheckpointNotFound):
            return
        assert set(checkpoint) <= {"a", "b"}
        assert all(checkpoint.tensor(tensor).eq(1).all() for tensor in checkpoint)


@pytest.mark.parametrize("count", [20_000])
def test_a_header_of_very_many_tensors_takes_memory_in_proportion(tmp_path: Path, count: int) -> None:
    """In a process of its own, so that its peak is this header's."""
    header = {f"model.layers.{i}.self_attn.q_proj.weight": entry((0,), 0, 0) for i in range(count)}
    (tmp_path / "model.safetensors").write_bytes(raw(header))
    code = (
        "import resource, sys; from pathlib import Path; from bestiary.checkpoint import Checkpoint\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "checkpoint = Checkpoint.open(Path(sys.argv[1]))\n"
        "print(len(checkpoint), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    tensors, used_kib, torch_loaded = done.stdout.split()
    assert (int(tensors), torch_loaded) == (count, "False")
    assert int(used_kib) * 1024 < 3000 * count
