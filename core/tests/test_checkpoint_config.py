"""ConfigFile: somebody else's JSON, read typed and strict. Both dialects of rope are compared through transformers."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bestiary.checkpoint import ConfigFile, RopeSettings, generation
from bestiary.checkpoint.jsonfile import read_object
from bestiary.errors import CheckpointMalformed, CheckpointNotFound, ConfigUnsupported

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def config(**values: Any) -> ConfigFile:
    return ConfigFile(values, Path("model/config.json"))


def write(folder: Path, text: str | bytes, name: str = "config.json") -> Path:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


# Reading the file.


def test_a_folders_config_is_read_with_its_architectures(tmp_path: Path) -> None:
    file = ConfigFile.load(write(tmp_path, '{"architectures": ["A", "B"], "auto_map": {"AutoModel": "x.py"}, "n": 3}'))
    assert file.architectures == ("A", "B")
    assert file.need("n", int) == 3
    assert file.values["n"] == 3 and file.path == tmp_path / "config.json"


def test_a_config_that_names_no_architecture_has_none() -> None:
    assert config().architectures == ()
    assert config(architectures=None).architectures == ()


def test_what_was_read_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        config(n=1).values["n"] = 2  # type: ignore[index]


def test_a_folder_without_a_config_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=re.escape(str(tmp_path / "config.json"))):
        ConfigFile.load(tmp_path)


def test_a_config_that_is_a_folder_or_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a" / "config.json").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / "config.json")
    for folder in ("a", "b"):
        with pytest.raises(CheckpointNotFound, match="is not a file"):
            ConfigFile.load(tmp_path / folder)


def test_a_path_that_the_system_refuses_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="cannot be read"):
        ConfigFile.load(tmp_path / ("x" * 5000))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ('{"a": 1} x', "not valid JSON"),
        ("{'a': 1}", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
        ('{"n": ' + "9" * 100_000 + "}", "not valid JSON"),
        ("[1]", "must be a JSON object"),
        ("null", "must be a JSON object"),
        ('"text"', "must be a JSON object"),
        ('{"b": 0, "a": 1, "c": 2, "a": 1}', "'a' stands twice"),
        ('{"x": {"deep": {"k": 1, "k": 2}}}', "'k' stands twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 1_000_000, "nested too deeply"),
    ],
)
def test_a_config_that_is_no_plain_json_object_is_malformed(tmp_path: Path, text: str | bytes, complaint: str) -> None:
    with pytest.raises(CheckpointMalformed, match=complaint) as caught:
        ConfigFile.load(write(tmp_path, text))
    assert str(tmp_path / "config.json") in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_file_beyond_its_limit_is_refused_without_being_parsed(tmp_path: Path) -> None:
    write(tmp_path, '{"a": 1}')
    assert read_object(tmp_path / "config.json", 8) == {"a": 1}
    with pytest.raises(CheckpointMalformed, match="more than 7 bytes"):
        read_object(tmp_path / "config.json", 7)
    write(tmp_path, '{"a": "' + "x" * 10_000_000 + '"}')
    with pytest.raises(CheckpointMalformed, match="more than 10,000,000 bytes"):
        ConfigFile.load(tmp_path)


# Typed keys.


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, int, 3),
        (0, int, 0),
        (-7, int, -7),
        (1.5, float, 1.5),
        (10000, float, 10000.0),
        ("silu", str, "silu"),
        ("", str, ""),
        (True, bool, True),
        (False, bool, False),
        ({"a": 1}, dict, {"a": 1}),
        ([1, 2], tuple[int, ...], (1, 2)),
        ([], tuple[int, ...], ()),
        ([1, 2.5], tuple[float, ...], (1.0, 2.5)),
        ([[1], []], tuple[tuple[int, ...], ...], ((1,), ())),
    ],
)
def test_a_value_of_the_right_type_is_returned(value: Any, kind: Any, expected: Any) -> None:
    for found in (config(k=value).need("k", kind), config(k=value).get("k", kind)):
        assert found == expected and type(found) is type(expected)


def test_an_integer_becomes_a_float_where_a_float_is_asked_for() -> None:
    assert type(config(k=1).need("k", float)) is float
    assert [type(x) for x in config(k=[1]).need("k", tuple[float, ...])] == [float]


@pytest.mark.parametrize(
    ("value", "kind", "wanted"),
    [
        (True, int, "an integer"),
        (1.0, int, "an integer"),
        ("1", int, "an integer"),
        (True, float, "a finite number"),
        ("1.0", float, "a finite number"),
        (math.nan, float, "a finite number"),
        (math.inf, float, "a finite number"),
        (10**400, float, "a finite number"),
        (-(10**400), float, "a finite number"),
        (1, str, "a string"),
        (1, bool, "true or false"),
        ("true", bool, "true or false"),
        ([1], dict, "an object"),
        (1, tuple[int, ...], "a list, each item an integer"),
        ([1, True], tuple[int, ...], "a list, each item an integer"),
        ([1, None], tuple[int, ...], "a list, each item an integer"),
        ([[1], 2], tuple[tuple[int, ...], ...], "a list, each item a list, each item an integer"),
    ],
)
def test_a_value_of_another_type_is_refused_with_file_and_key(value: Any, kind: Any, wanted: str) -> None:
    for read in (config(k=value).need, config(k=value).get):
        with pytest.raises(ConfigUnsupported, match=rf"model/config\.json: k is .*; it must be {wanted}$"):
            read("k", kind)


def test_infinity_is_let_through_where_it_is_asked_for_and_nan_never(tmp_path: Path) -> None:
    file = ConfigFile.load(write(tmp_path, '{"limit": [0.0, Infinity], "low": -Infinity, "nan": NaN}'))
    assert file.need("limit", tuple[float, ...], infinite=True) == (0.0, math.inf)
    assert file.get("low", float, infinite=True) == -math.inf
    with pytest.raises(ConfigUnsupported, match="limit is"):
        file.need("limit", tuple[float, ...])
    with pytest.raises(ConfigUnsupported, match="nan is nan"):
        file.need("nan", float, infinite=True)


@pytest.mark.parametrize("values", [{}, {"k": None}])
def test_an_absent_or_null_key_gives_the_default_or_is_missed(values: dict[str, Any]) -> None:
    assert config(**values).get("k", int) is None
    assert config(**values).get("k", int, 4) == 4
    assert "k" not in config(**values)
    with pytest.raises(ConfigUnsupported, match=r"model/config\.json: k is missing; it must be an integer"):
        config(**values).need("k", int)


def test_of_several_spellings_the_first_that_is_there_counts() -> None:
    keys = ("num_attention_heads", "n_head")
    assert config(n_head=4).need(keys, int) == 4
    assert config(num_attention_heads=None, n_head=4).need(keys, int) == 4
    assert config(num_attention_heads=8, n_head=4).get(keys, int) == 8
    with pytest.raises(ConfigUnsupported, match="num_attention_heads or n_head is missing"):
        config().need(keys, int)
    with pytest.raises(ConfigUnsupported, match="n_head is 'x'"):
        config(n_head="x").need(keys, int)


def test_a_dot_leads_into_a_nested_object() -> None:
    file = config(a={"b": {"c": 5}}, n=3, gone=None)
    assert file.need("a.b.c", int) == 5
    assert file.get("a.b.d", int) is None
    assert file.get("gone.x", int) is None and file.get("never.x.y", int) is None
    assert "a.b.c" in file and "a.x" not in file
    with pytest.raises(ConfigUnsupported, match=r"a\.b\.d is missing"):
        file.need("a.b.d", int)
    with pytest.raises(ConfigUnsupported, match="n is 3; it must be an object"):
        file.get("n.x", int)
    with pytest.raises(ConfigUnsupported, match=r"a\.b\.c is 5; it must be an object"):
        file.get("a.b.c.d", int)


def test_a_section_reads_its_keys_and_names_them_in_full() -> None:
    file = config(text_config={"width": 8, "inner": {"eps": "x"}}, width=4, n=1)
    assert file.section("text_config").need("width", int) == 8
    with pytest.raises(ConfigUnsupported, match=r"model/config\.json: text_config\.inner\.eps is 'x'"):
        file.section("text_config").section("inner").need("eps", float)
    with pytest.raises(ConfigUnsupported, match=r"text_config\.inner\.gone is missing"):
        file.section("text_config.inner").need("gone", float)
    with pytest.raises(ConfigUnsupported, match="vision_config or visual is missing; it must be an object"):
        file.section(("vision_config", "visual"))
    with pytest.raises(ConfigUnsupported, match="n is 1; it must be an object"):
        file.section("n")


def test_an_expected_value_is_returned_and_any_other_refused_with_what_is_supported() -> None:
    assert config(act="silu").expect("act", "silu", "swish") == "silu"
    assert config(n=2).expect("n", 1.0, 2.0) == 2.0
    with pytest.raises(ConfigUnsupported, match=r"model/config\.json: act is 'gelu'; supported: 'silu', 'swish'$"):
        config(act="gelu").expect("act", "silu", "swish")
    with pytest.raises(ConfigUnsupported, match="hidden_act or act is missing; supported: 'silu'"):
        config().expect(("hidden_act", "act"), "silu")


def test_true_is_not_one_for_an_expected_value() -> None:
    with pytest.raises(ConfigUnsupported, match="k is True; supported: 1"):
        config(k=True).expect("k", 1)
    with pytest.raises(ConfigUnsupported, match="k is 0; supported: False"):
        config(k=0).expect("k", False)


def test_an_expected_value_may_be_absent_where_a_default_or_none_stands_for_it() -> None:
    assert config().expect("act", "silu", default="silu") == "silu"
    assert config(act=None).expect("act", "silu", default="silu") == "silu"
    assert config(flag=None).expect("flag", False, default=False) is False
    assert config().expect("window", None) is None
    with pytest.raises(ConfigUnsupported, match="window is 4096; supported: None"):
        config(window=4096).expect("window", None)


def test_an_error_quotes_a_huge_value_only_in_part() -> None:
    for value in ("x" * 10**6, [1] * 10**6, [[[[[[[[[[1]]]]]]]]]]):
        with pytest.raises(ConfigUnsupported) as caught:
            config(k=value).need("k", int)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({"dtype": None, "torch_dtype": "torch.float32"}, "float32"),
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, "bfloat16"),
    ],
)
def test_the_dtype_is_read_in_both_spellings(values: dict[str, Any], expected: str | None) -> None:
    assert config(**values).dtype == expected


def test_token_ids_are_one_or_a_list() -> None:
    assert config(eos=2).token_ids("eos") == (2,)
    assert config(eos=[2, 3]).token_ids("eos") == (2, 3)
    assert config().token_ids("eos") == ()
    with pytest.raises(ConfigUnsupported, match="eos is"):
        config(eos="</s>").token_ids("eos")


# Rope, in the dialect of transformers 4 and of 5.


def test_rope_without_any_key_has_the_default_base() -> None:
    assert config().rope() == RopeSettings(theta=10000.0)
    assert config(rope_scaling=None, rope_parameters=None).rope(theta=1e6) == RopeSettings(theta=1e6)


def test_rope_is_read_from_theta_and_scaling() -> None:
    found = config(rope_theta=500000, rope_scaling=LLAMA3, max_position_embeddings=1024).rope()
    assert found == RopeSettings(
        theta=500000.0,
        type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )


def test_rope_is_read_from_parameters() -> None:
    old = config(rope_theta=500000, rope_scaling=LLAMA3, max_position_embeddings=1024).rope()
    assert config(rope_parameters={"rope_theta": 5e5, **LLAMA3}, max_position_embeddings=1024).rope() == old
    assert config(rope_parameters=LLAMA3, rope_theta=5e5, max_position_embeddings=1024).rope() == old


def test_rope_takes_the_old_word_for_the_type() -> None:
    assert config(rope_scaling={"type": "linear", "factor": 2}).rope() == RopeSettings(1e4, "linear", factor=2.0)
    assert config(rope_scaling={"type": "mrope", "rope_type": "default"}).rope().type == "default"


def test_rope_reads_every_number_of_every_kind() -> None:
    numbers = {
        "attention_factor": 0.5,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.708,
        "partial_rotary_factor": 0.5,
        "truncate": False,
        "short_factor": [1, 2.5],
        "long_factor": [3.0, 4.0],
    }
    found = config(rope_scaling={"type": "yarn", **numbers}).rope()
    expected = {**numbers, "short_factor": (1.0, 2.5), "long_factor": (3.0, 4.0)}
    assert {name: getattr(found, name) for name in numbers} == expected


def test_rope_takes_from_the_top_level_what_stands_there() -> None:
    found = config(
        original_max_position_embeddings=4096,
        max_position_embeddings=131072,
        partial_rotary_factor=0.75,
        rope_scaling={"type": "longrope", "original_max_position_embeddings": 7},
    ).rope()
    assert (found.original_max_position_embeddings, found.partial_rotary_factor) == (4096, 0.75)
    assert config(max_position_embeddings=2048).rope().original_max_position_embeddings == 2048


def test_rope_scaling_holds_where_both_dialects_stand() -> None:
    both = config(
        rope_scaling={"type": "linear", "factor": 2.0},
        rope_parameters={"rope_type": "default", "rope_theta": 5e5, "factor": 9.0},
    ).rope()
    assert (both.type, both.factor, both.theta) == ("linear", 2.0, 5e5)


def test_a_number_that_the_rope_type_needs_is_missed_by_its_key() -> None:
    found = config(text_config={"rope_scaling": {"type": "linear"}}).section("text_config").rope()
    with pytest.raises(
        ConfigUnsupported, match=r"config\.json: text_config\.rope_scaling\.factor is missing.*'linear'"
    ):
        found.need("factor")
    assert config(rope_parameters={"factor": 4}).rope().need("factor") == 4.0


def test_rope_that_differs_between_layers_is_refused() -> None:
    with pytest.raises(ConfigUnsupported, match="rope_parameters differs from layer to layer"):
        config(rope_parameters={"full_attention": {"rope_theta": 1e6}, "sliding_attention": {}}).rope()


def test_mistyped_rope_is_refused_with_its_key() -> None:
    with pytest.raises(ConfigUnsupported, match=r"rope_scaling\.factor is '8'"):
        config(rope_scaling={"type": "linear", "factor": "8"}).rope()
    with pytest.raises(ConfigUnsupported, match="rope_scaling is 'linear'; it must be an object"):
        config(rope_scaling="linear").rope()


@pytest.mark.parametrize(
    "old",
    [
        {"rope_theta": 500000.0},
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16}},
    ],
)
def test_both_dialects_of_one_configuration_give_the_same_rope(old: dict[str, Any], tmp_path: Path) -> None:
    """transformers reads the old dialect and writes the new one."""
    from transformers import LlamaConfig

    common: dict[str, Any] = {"max_position_embeddings": 128, "hidden_size": 32, "num_attention_heads": 4}
    LlamaConfig(**common, **old).save_pretrained(tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in new and "rope_scaling" not in new
    assert config(**common, **old).rope() == config(**new).rope()


# generation_config.json


def test_generation_settings_are_typed_and_others_ignored(tmp_path: Path) -> None:
    write(
        tmp_path,
        '{"eos_token_id": [128001, 128009], "bos_token_id": 128000, "pad_token_id": null, "temperature": 1, '
        '"top_p": 0.9, "top_k": 50, "min_p": 0.1, "repetition_penalty": 1.1, "max_new_tokens": 64, "do_sample": true, '
        '"transformers_version": "4.45"}',
        "generation_config.json",
    )
    assert generation(tmp_path) == {
        "eos_token_id": (128001, 128009),
        "bos_token_id": 128000,
        "temperature": 1.0,
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "max_new_tokens": 64,
    }


def test_a_single_stop_token_is_a_tuple_of_one(tmp_path: Path) -> None:
    assert generation(write(tmp_path, '{"eos_token_id": 0}', "generation_config.json")) == {"eos_token_id": (0,)}


def test_without_a_generation_config_there_are_no_settings(tmp_path: Path) -> None:
    assert generation(tmp_path) == {}


def test_a_mistyped_generation_setting_is_refused_with_its_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigUnsupported, match=r"generation_config\.json: temperature is 'hot'"):
        generation(write(tmp_path, '{"temperature": "hot"}', "generation_config.json"))


def test_reading_configurations_and_names_imports_no_torch() -> None:
    code = "import sys, bestiary.checkpoint; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# Sizes, and conditions between values.


def test_a_size_is_at_least_one() -> None:
    assert config(n=3).size("n") == 3
    assert config().size("n", 7) == config(n=None).size("n", 7) == 7
    for bad in (0, -1):
        with pytest.raises(ConfigUnsupported, match=rf"config.json: n is {bad}; it must be at least 1"):
            config(n=bad).size("n")
    with pytest.raises(ConfigUnsupported, match="n is missing"):
        config().size("n")


def test_a_condition_between_values_names_the_key() -> None:
    config(n=3).must(True, "n", "is odd")
    with pytest.raises(ConfigUnsupported, match=r"config.json: n is odd"):
        config(n=3).must(False, "n", "is odd")
