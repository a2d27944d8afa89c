"""GGUF read as data: the container, the quantised blocks, the tokenizer, and the folder that is written."""

import json
import os
import struct
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from bestiary.checkpoint.gguf import GGUFFile, Stored, folder, tokenizer_json, write_folder
from bestiary.errors import CapabilityMissing, CheckpointError, CheckpointMalformed, CheckpointNotFound

Q4_1, Q8_0, F16, BF16, F32 = (gguf.GGMLQuantizationType[name] for name in ("Q4_1", "Q8_0", "F16", "BF16", "F32"))
MIXED = np.array([[1.5, -2.25, 3.1415927], [0.0, 1e-8, -65504.0]], np.float32)


def file_with(path: Path, tensors: Mapping[str, tuple[bytes, tuple[int, ...], Any]], **metadata: Any) -> Path:
    """A GGUF file written by the gguf package itself; shapes are torch's, in values."""
    writer = gguf.GGUFWriter(path, "test")
    for key, value in metadata.items():
        add = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}
        getattr(writer, add[type(value)])(key.replace("__", "."), value)
    for name, (raw, shape, kind) in tensors.items():
        rows = np.frombuffer(raw, np.uint8).reshape(*shape[:-1], -1)
        writer.add_tensor(name, rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantised(path: Path, raw: bytes, shape: tuple[int, ...], kind: Any) -> torch.Tensor:
    return GGUFFile.open(file_with(path, {"t": (raw, shape, kind)})).dequantised("t")


def test_metadata_comes_with_its_type(tmp_path: Path) -> None:
    path = file_with(
        tmp_path / "a.gguf", {}, a__int=7, a__float=0.5, a__bool=True, a__text="é", a__texts=["x", "y"], a__ints=[1, -2]
    )
    file = GGUFFile.open(path)
    assert (file.need("a.int", int), file.need("a.float", float), file.need("a.bool", bool)) == (7, 0.5, True)
    assert (file.need("a.text", str), file.need("a.texts", list)) == ("é", ["x", "y"])
    assert file.need("a.ints", list) == [1, -2]
    assert file.get("a.other", int, 3) == 3


def test_a_float_is_the_shortest_decimal_that_it_can_be(tmp_path: Path) -> None:
    """config.json shall say 1e-05, as the original does, and not 9.999999747378752e-06."""
    file = GGUFFile.open(file_with(tmp_path / "a.gguf", {}, eps=1e-5, base=1e6, third=1 / 3, huge=float("inf")))
    assert [file.need(key, float) for key in ("eps", "base", "third", "huge")] == [1e-05, 1e6, 0.33333334, float("inf")]


def test_a_missing_or_mistyped_key_is_named_with_the_file(tmp_path: Path) -> None:
    file = GGUFFile.open(file_with(tmp_path / "a.gguf", {}, flag=True))
    with pytest.raises(CheckpointMalformed, match=r"a\.gguf.*no 'layers'"):
        file.need("layers", int)
    with pytest.raises(CheckpointMalformed, match=r"a\.gguf.*'flag' should be of type int, not bool"):
        file.get("flag", int, 0)


def test_q8_0_is_a_scale_times_signed_bytes(tmp_path: Path) -> None:
    quants = [-128, 127, 0, 1, *range(2, 30)]
    raw = struct.pack("<e32b", 0.25, *quants) + struct.pack("<e32b", -2.0, *quants)
    expected = torch.tensor([[0.25 * q for q in quants], [-2.0 * q for q in quants]])
    assert torch.equal(dequantised(tmp_path / "a.gguf", raw, (2, 32), Q8_0), expected)


def test_q4_1_is_a_scale_times_nibbles_plus_a_minimum_low_nibbles_first(tmp_path: Path) -> None:
    low, high = [i % 16 for i in range(16)], [(5 * i + 3) % 16 for i in range(16)]
    raw = struct.pack("<ee16B", 0.5, -3.0, *(a | b << 4 for a, b in zip(low, high, strict=True)))
    expected = torch.tensor([[0.5 * q - 3.0 for q in low + high]])
    assert torch.equal(dequantised(tmp_path / "a.gguf", raw, (1, 32), Q4_1), expected)


def test_half_precision_is_exact(tmp_path: Path) -> None:
    f16 = torch.from_numpy(MIXED).half()
    bf16 = torch.from_numpy(MIXED).bfloat16()
    assert torch.equal(dequantised(tmp_path / "a", f16.numpy().tobytes(), (2, 3), F16), f16.float())
    assert torch.equal(
        dequantised(tmp_path / "b", bf16.view(torch.uint8).numpy().tobytes(), (2, 3), BF16), bf16.float()
    )


def test_float32_is_a_copy_that_the_caller_may_change(tmp_path: Path) -> None:
    path = file_with(tmp_path / "a.gguf", {"t": (MIXED.tobytes(), (2, 3), F32)})
    file = GGUFFile.open(path)
    first = file.dequantised("t")
    assert torch.equal(first, torch.from_numpy(MIXED))
    first.zero_()
    assert torch.equal(file.dequantised("t"), torch.from_numpy(MIXED))


def test_shapes_are_in_torchs_order(tmp_path: Path) -> None:
    file = GGUFFile.open(file_with(tmp_path / "a.gguf", {"m": (bytes(2 * 3 * 4 * 4), (2, 3, 4), F32)}))
    assert (file.names, file.shape("m")) == (("m",), (2, 3, 4))
    with pytest.raises(CheckpointMalformed, match="no tensor 'n'"):
        file.shape("n")


def test_a_kind_that_gguf_cannot_dequantise_is_named(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.I8
    with pytest.raises(CapabilityMissing, match="'t' is stored as I8"):
        dequantised(tmp_path / "a.gguf", bytes(4), (1, 4), kind)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    tensors = {"a": (bytes(34 * 2), (2, 32), Q8_0), "b": (MIXED.tobytes(), (2, 3), F32)}
    return file_with(path, tensors, one=1, texts=["x", "yz"], numbers=[1, 2, 3]).read_bytes()


def open_bytes(folder: Path, content: bytes) -> GGUFFile:
    (folder / "a.gguf").write_bytes(content)
    return GGUFFile.open(folder / "a.gguf")


def test_a_file_cut_anywhere_is_malformed(whole: bytes, tmp_path: Path) -> None:
    """The padding behind the last tensor is nobody's, so that cutting there loses nothing."""
    end = len(whole) - 8
    assert open_bytes(tmp_path, whole[:end]).names == ("a", "b")
    for size in range(end):
        with pytest.raises(CheckpointMalformed, match=r"a\.gguf"):
            open_bytes(tmp_path, whole[:size])


@settings(max_examples=300, deadline=30_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_with_any_bytes_changed_is_read_or_malformed_but_never_crashes_or_hangs(
    whole: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(whole) - 1))
    noise = data.draw(st.binary(min_size=1, max_size=9) | st.just(b"\xff" * 8))
    try:
        file = open_bytes(tmp_path, whole[:at] + noise + whole[at + len(noise) :])
    except CheckpointMalformed:
        return
    for name in file.names:
        assert file.dequantised(name).shape == file.shape(name)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04" + bytes(60), "does not begin with GGUF"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(60), "little endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"k", 99), "unknown kind 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 0, 2**60), "bytes should follow"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 2**60), "bytes should follow"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIB", 1, b"\xff", 0, 0), "not UTF-8"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * struct.pack("<Q1sIB", 1, b"k", 0, 0), "'k' stands twice"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sI", 1, b"t", 0), "0 dimensions"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 2**60, 0, 0), "reaches beyond"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 999, 0), "unknown kind 999"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 31, 8, 0), "32 values a block"),
    ],
)
def test_what_cannot_be_a_gguf_file_says_why(tmp_path: Path, content: bytes, complaint: str) -> None:
    with pytest.raises(CheckpointMalformed, match=complaint):
        open_bytes(tmp_path, content)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="cannot be read"):
        GGUFFile.open(tmp_path / "absent.gguf")


def test_without_the_gguf_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CapabilityMissing, match=r"pip install 'bestiary\[gguf\]'"):
        GGUFFile.open(tmp_path / "a.gguf")


# The tokenizer. Ġ is how byte-level BPE writes a space.

BYTES = [chr(i) for i in [*range(33, 127), *range(161, 173), *range(174, 256)]] + [chr(256 + i) for i in range(68)]
TOKENS = ["<end>", "<start>", *BYTES, "ab", "Ġa", "Ġab", "12", "ab1", "[tool]"]
KINDS = [3, 3, *[1] * len(BYTES), 1, 1, 1, 1, 1, 4]
MERGES = ["Ġ a", "a b", "Ġa b", "1 2", "ab 1"]


def tokenizer_file(path: Path, **changes: Any) -> GGUFFile:
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": TOKENS,
        "token_type": KINDS,
        "merges": MERGES,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "unknown_token_id": 0,
        **changes,
    }
    present = {f"tokenizer__ggml__{key}": value for key, value in metadata.items() if value is not None}
    template = {"tokenizer__chat_template": "{{ messages[0].content }}"}
    return GGUFFile.open(file_with(path, {"w": (MIXED.tobytes(), (2, 3), F32)}, **present, **template))


def tokens_of(file: GGUFFile, text: str, **how: bool) -> list[str]:
    tokens: list[str] = Tokenizer.from_str(tokenizer_json(file)).encode(text, **how).tokens
    return tokens


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["ab", "Ġab", "12", "3", "Ġ", "Ġa"]),
        ("smollm", ["ab", "Ġab", "1", "2", "3", "Ġ", "Ġa"]),
        ("llama-bpe", ["ab", "Ġab", "12", "3", "Ġ", "Ġa"]),
    ],
)
def test_the_named_pre_tokenizer_cuts_the_text(tmp_path: Path, pre: str, expected: list[str]) -> None:
    file = tokenizer_file(tmp_path / "a.gguf", pre=pre, add_bos_token=False)
    assert tokens_of(file, "ab ab123  a") == expected


def test_llama_bpe_cuts_numbers_into_threes_and_takes_whole_words_as_they_are(tmp_path: Path) -> None:
    """`zab` is a token that no merge leads to."""
    tokens, kinds = [*TOKENS, "123", "zab"], [*KINDS, 1, 1]
    file = tokenizer_file(tmp_path / "a.gguf", pre="llama-bpe", add_bos_token=False, tokens=tokens, token_type=kinds)
    assert tokens_of(file, "123123zab") == ["123", "123", "zab"]


def test_a_text_survives_the_round_trip(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(tokenizer_json(tokenizer_file(tmp_path / "a.gguf", pre="smollm")))
    text = " ab\n\n\tdéjà vu 42 \u3000漢字 🦙🏽'll  "
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_control_tokens_are_special_and_user_defined_ones_are_plain(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(tokenizer_json(tokenizer_file(tmp_path / "a.gguf")))
    ids = tokenizer.encode("<start>ab[tool]<end>").ids
    assert ids == [1, TOKENS.index("ab"), TOKENS.index("[tool]"), 0]
    assert tokenizer.decode(ids) == "ab[tool]"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<start>ab[tool]<end>"


@pytest.mark.parametrize(
    ("pre", "changes", "expected"),
    [
        ("gpt-2", {}, ["ab"]),
        ("llama-bpe", {}, ["<start>", "ab"]),
        ("gpt-2", {"add_bos_token": True}, ["<start>", "ab"]),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, ["<start>", "ab", "<end>"]),
    ],
)
def test_begin_and_end_are_added_as_the_file_says(
    tmp_path: Path, pre: str, changes: dict[str, Any], expected: list[str]
) -> None:
    file = tokenizer_file(tmp_path / "a.gguf", pre=pre, **changes)
    assert tokens_of(file, "ab") == expected
    assert tokens_of(file, "ab", add_special_tokens=False) == ["ab"]


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"model": "llama"}, CapabilityMissing, "SentencePiece"),
        ({"pre": "unheard-of"}, CapabilityMissing, "'unheard-of', and known are gpt-2, smollm, llama-bpe"),
        ({"pre": None}, CapabilityMissing, "'default'"),
        ({"model": None}, CheckpointMalformed, "tokenizer.ggml.model"),
        ({"merges": ["a nothing"]}, CheckpointMalformed, "merges do not fit"),
        ({"merges": ["ab"]}, CheckpointMalformed, "merges do not fit"),
        ({"merges": [1]}, CheckpointMalformed, "merges should hold texts"),
        ({"tokens": ["a", "a"]}, CheckpointMalformed, "a token twice"),
        ({"token_type": [1]}, CheckpointMalformed, "and 1 in tokenizer.ggml.token_type"),
        ({"add_bos_token": True, "bos_token_id": None}, CheckpointMalformed, "bos_token_id is missing"),
        ({"eos_token_id": 10**6}, CheckpointMalformed, "eos_token_id is 1000000"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_says_why(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        tokenizer_json(tokenizer_file(tmp_path / "a.gguf", **changes))


# The folder.

CONFIG = {"architectures": ["Any"], "max_position_embeddings": 128}
WEIGHTS = {"model.w": Stored("w", lambda w: w.flip(0)), "head.w": Stored("w")}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_folder_holds_what_the_file_said(tmp_path: Path) -> None:
    file = tokenizer_file(tmp_path / "a.gguf", padding_token_id=2)
    write_folder(tmp_path / "out", file, CONFIG, WEIGHTS)
    out = tmp_path / "out"
    ids = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 2}
    assert read_json(out / "config.json") == {**CONFIG, **ids}
    assert read_json(out / "generation_config.json") == ids
    assert read_json(out / "tokenizer_config.json") == {
        "bos_token": "<start>",
        "eos_token": "<end>",
        "unk_token": "<end>",
        "pad_token": "!",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 128,
        "clean_up_tokenization_spaces": False,
    }
    assert (out / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert (out / "tokenizer.json").read_text() == tokenizer_json(file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "out"]


def test_weights_are_written_as_bfloat16_in_the_order_of_hugging_face(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", tokenizer_file(tmp_path / "a.gguf"), CONFIG, WEIGHTS)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}
        expected = torch.from_numpy(MIXED).bfloat16()
        assert torch.equal(tensors.get_tensor("head.w"), expected)
        assert torch.equal(tensors.get_tensor("model.w"), expected.flip(0))


def test_where_a_turn_ends_otherwise_both_tokens_end_the_text(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", tokenizer_file(tmp_path / "a.gguf", eot_token_id=5), CONFIG, WEIGHTS)
    assert read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [0, 5]


def test_a_weight_may_not_change_its_shape(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMalformed, match="'w' changed its shape"):
        write_folder(tmp_path / "out", tokenizer_file(tmp_path / "a.gguf"), CONFIG, {"w": Stored("w", lambda w: w.mT)})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_disk_that_does_not_take_it_says_so_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: OSError
) -> None:
    def refuse(_: int) -> None:
        raise failure

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match=f"cannot write .*out: {failure.strerror}.*BESTIARY_CACHE"):
        write_folder(tmp_path / "out", tokenizer_file(tmp_path / "a.gguf"), CONFIG, WEIGHTS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_an_interrupted_import_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(_: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "out", tokenizer_file(tmp_path / "a.gguf"), CONFIG, {"w": Stored("w", interrupt)})
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_importers_at_the_same_time_all_succeed(tmp_path: Path) -> None:
    """All wait for each other while they write, so that all but one find the folder taken."""
    together = threading.Barrier(4, timeout=10)

    def wait(weight: torch.Tensor) -> torch.Tensor:
        together.wait()
        return weight

    file = tokenizer_file(tmp_path / "a.gguf")
    failures: list[BaseException] = []

    def work() -> None:
        try:
            write_folder(tmp_path / "out", file, CONFIG, {"w": Stored("w", wait)})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "out"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as tensors:
        assert torch.equal(tensors.get_tensor("w"), torch.from_numpy(MIXED).bfloat16())


def test_what_a_killed_importer_left_is_cleared_away_but_not_a_running_ones(tmp_path: Path) -> None:
    killed, running = tmp_path / ".out.1234", tmp_path / ".out.5678"
    killed.mkdir()
    running.mkdir()
    long_ago = time.time() - folder.STALE_S - 1
    os.utime(killed, (long_ago, long_ago))
    write_folder(tmp_path / "out", tokenizer_file(tmp_path / "a.gguf"), CONFIG, WEIGHTS)
    assert (killed.exists(), running.exists()) == (False, True)
