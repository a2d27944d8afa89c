"""EngineConfig: vLLM's names and defaults, where values come from, and what cannot be is refused by name."""

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bestiary.config import EngineConfig, cache_home
from bestiary.errors import BestiaryError, CapabilityMissing, SettingError

#: The public settings, each with its default. Changing this list changes the public interface.
FIELDS: dict[str, Any] = {
    "model": dataclasses.MISSING,
    "tokenizer": None,
    "skip_tokenizer_init": False,
    "revision": None,
    "load_format": "auto",
    "dtype": "auto",
    "quantization": None,
    "device": "auto",
    "max_model_len": None,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 2048,
    "block_size": 16,
    "enable_prefix_caching": True,
    "kv_cache_memory_bytes": None,
    "gpu_memory_utilization": 0.9,
    "num_gpu_blocks_override": None,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "executor": "auto",
    "execute_model_timeout_seconds": 300.0,
    "nnodes": 1,
    "node_rank": 0,
    "master_addr": "127.0.0.1",
    "master_port": 29501,
    "enable_lora": True,
    "max_loras": 1,
    "max_lora_rank": 16,
    "max_cpu_loras": None,
    "lora_modules": {},
    "allowed_lora_path": None,
    "seed": 0,
    "max_logprobs": 20,
    "generation_config": "auto",
    "limit_mm_per_prompt": {},
    "allowed_media_domains": (),
    "allowed_local_media_path": None,
    "plugin": {},
}
#: Environment variables that are read by name; the others are BESTIARY_ and the name of a field.
VARIABLES = {
    "BESTIARY_CACHE",
    "BESTIARY_CONFIG",
    "BESTIARY_DEBUG",
    "BESTIARY_KERNELS",
    "BESTIARY_LOAD_PLUGINS",
    "BESTIARY_NODE_KEY",
    "BESTIARY_PLUGIN",
    "BESTIARY_SQUEEZE",
    "BESTIARY_USE_MODELSCOPE",
}
SETTABLE = FIELDS.keys() - {"model", "plugin"}
ROOT = Path(__file__).parents[2]

TEXTS: list[Any] = [1, 1.0, True, b"x", [], {}, object()]
COUNTS: list[Any] = [0, -1, -(10**30), -(10**400), 1.0, 1.5, math.nan, math.inf, "1", "", True, [], {}]
BAD: dict[str, list[Any]] = {
    "model": [None, *TEXTS],
    "tokenizer": TEXTS,
    "revision": TEXTS,
    "load_format": [None, "", "pt", *TEXTS],
    "dtype": [None, "", "int8", "bf16", "AUTO", *TEXTS],
    "quantization": ["", "int2", "INT8", "gptq", *TEXTS],
    "device": [None, *TEXTS],
    "generation_config": [None, "", "vllm", *TEXTS],
    "skip_tokenizer_init": [None, 0, 1, "true", 1.0],
    "enable_prefix_caching": [None, 0, 1, "true", 1.0],
    "max_model_len": COUNTS,
    "max_num_seqs": [None, *COUNTS],
    "max_num_batched_tokens": [None, *COUNTS],
    "block_size": [None, *COUNTS],
    "kv_cache_memory_bytes": COUNTS,
    "num_gpu_blocks_override": COUNTS,
    "max_logprobs": [None, *(value for value in COUNTS if value != 0 or value is False)],
    "tensor_parallel_size": [None, *COUNTS],
    "pipeline_parallel_size": [None, *COUNTS],
    "executor": [None, "", "uni", "MP", *TEXTS],
    "execute_model_timeout_seconds": [None, 0, -0.1, 10**400, math.nan, math.inf, -math.inf, "9", True],
    "nnodes": [None, 2, *COUNTS],
    "node_rank": [None, 1, *(value for value in COUNTS if value != 0 or value is False)],
    "master_addr": [None, "", *TEXTS],
    "master_port": [None, 2**16, *COUNTS],
    "enable_lora": [None, 0, 1, "true", 1.0],
    "max_loras": [None, *COUNTS],
    "max_lora_rank": [None, *COUNTS],
    "max_cpu_loras": COUNTS,
    "lora_modules": [None, "a=b", [], 1, {1: "b"}, {"a": 1}, {"a": None}],
    "allowed_lora_path": TEXTS,
    "gpu_memory_utilization": [None, 0, -0.1, 1.01, 10**400, math.nan, math.inf, -math.inf, "0.9", True],
    "seed": [None, 2**63, -(2**63) - 1, 10**400, 0.0, math.nan, "0", True],
    "limit_mm_per_prompt": [None, "image=1", [], 1, {1: 1}, {"image": "1"}, {"image": -1}, {"image": True}],
    "allowed_media_domains": [None, "example.com", b"x", 1, {}, [1], [""]],
    "allowed_local_media_path": TEXTS,
    "plugin": [None, "A=b", [], 1, {1: "b"}, {"A": 1}, {"A": None}],
}


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings but the test's: no variable, and a home without a file."""
    for name in [name for name in os.environ if name.startswith("BESTIARY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


def bad_values() -> Iterator[Any]:
    for name, values in BAD.items():
        for value in values:
            yield name, value


def test_there_are_bad_values_for_every_field() -> None:
    assert set(BAD) == set(FIELDS)


@pytest.mark.parametrize(("name", "value"), list(bad_values()), ids=lambda value: type(value).__name__)
def test_a_value_that_cannot_be_is_refused_by_the_fields_name(name: str, value: Any) -> None:
    with pytest.raises(SettingError, match=name) as caught:
        EngineConfig(**{"model": "m", name: value})
    assert isinstance(caught.value, ValueError)


def test_there_is_memory_for_as_many_adapters_as_can_be_in_a_batch() -> None:
    with pytest.raises(SettingError, match="max_cpu_loras=1: it must be at least max_loras=2"):
        EngineConfig(model="m", max_loras=2, max_cpu_loras=1)


def test_hosts_share_the_ranks_equally_and_ray_finds_hosts_itself() -> None:
    EngineConfig(model="m", nnodes=2, tensor_parallel_size=2, pipeline_parallel_size=3)
    with pytest.raises(SettingError, match="nnodes=2: 3 ranks cannot be shared equally"):
        EngineConfig(model="m", nnodes=2, tensor_parallel_size=3)
    with pytest.raises(SettingError, match="nnodes=2: Ray finds hosts itself"):
        EngineConfig(model="m", nnodes=2, tensor_parallel_size=2, executor="ray")


# ---- frozen lists ----------------------------------------------------------------------------------------------------


def test_names_and_defaults_are_as_listed() -> None:
    found: dict[str, Any] = {}
    for one in dataclasses.fields(EngineConfig):
        found[one.name] = {} if one.default_factory is dict else one.default
    assert found == FIELDS
    assert dataclasses.asdict(EngineConfig(model="m")) == {**FIELDS, "model": "m"}


def test_settings_do_not_change_once_made() -> None:
    config = EngineConfig(model="m")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


def test_no_other_environment_variable_is_read() -> None:
    """A variable is an interface too: the sources name these and no more."""
    sources = [path for top in ("core/src", "kernels/src", "plugins") for path in (ROOT / top).rglob("*.py")]
    assert len(sources) > 40
    named = {name for path in sources for name in re.findall(r"BESTIARY_[A-Z_]*[A-Z]", path.read_text())}
    assert named == VARIABLES


# ---- where values come from ------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_an_argument_beats_the_environment_beats_the_file_beats_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(tmp_path / ".config/bestiary/config.toml", "seed = 1\nblock_size = 2\nmax_num_seqs = 3\n")
    monkeypatch.setenv("BESTIARY_SEED", "10")
    monkeypatch.setenv("BESTIARY_BLOCK_SIZE", "20")
    config = EngineConfig.resolve(model="m", seed=100)
    assert (config.seed, config.block_size, config.max_num_seqs, config.max_logprobs) == (100, 20, 3, 20)
    assert EngineConfig.resolve(model="m", block_size=7).seed == 10


def test_none_is_an_argument_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BESTIARY_MAX_MODEL_LEN", "77")
    assert EngineConfig.resolve(model="m").max_model_len == 77
    assert EngineConfig.resolve(model="m", max_model_len=None).max_model_len is None


TEXT_VALUES: dict[str, tuple[str, Any]] = {
    "tokenizer": ("there", "there"),
    "skip_tokenizer_init": ("1", True),
    "revision": ("main", "main"),
    "load_format": ("dummy", "dummy"),
    "dtype": ("bfloat16", "bfloat16"),
    "quantization": ("int8", "int8"),
    "device": ("cpu", "cpu"),
    "max_model_len": ("128", 128),
    "max_num_seqs": ("3", 3),
    "max_num_batched_tokens": ("64", 64),
    "block_size": ("8", 8),
    "enable_prefix_caching": ("FALSE", False),
    "kv_cache_memory_bytes": ("1000000", 1_000_000),
    "gpu_memory_utilization": ("0.5", 0.5),
    "num_gpu_blocks_override": ("9", 9),
    "tensor_parallel_size": ("1", 1),
    "pipeline_parallel_size": ("1", 1),
    "executor": ("mp", "mp"),
    "execute_model_timeout_seconds": ("2.5", 2.5),
    "nnodes": ("2", 2),
    "node_rank": ("1", 1),
    "master_addr": ("node0.example", "node0.example"),
    "master_port": ("4000", 4000),
    "enable_lora": ("0", False),
    "max_loras": ("2", 2),
    "max_lora_rank": ("8", 8),
    "max_cpu_loras": ("4", 4),
    "lora_modules": ("a=/x/y, b=z=1", {"a": "/x/y", "b": "z=1"}),
    "allowed_lora_path": ("/adapters", "/adapters"),
    "seed": ("-4", -4),
    "max_logprobs": ("0", 0),
    "generation_config": ("none", "none"),
    "limit_mm_per_prompt": ("image=2, audio=0", {"image": 2, "audio": 0}),
    "allowed_media_domains": ("a.example, b.example", ["a.example", "b.example"]),
    "allowed_local_media_path": ("/media", "/media"),
}


def test_every_setting_has_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TEXT_VALUES.keys() == SETTABLE
    for name, (text, _) in TEXT_VALUES.items():
        monkeypatch.setenv(f"BESTIARY_{name.upper()}", text)
    monkeypatch.setenv("BESTIARY_PLUGIN", "A=one, B=two")
    monkeypatch.setenv("BESTIARY_MODEL", "ignored: a model is always an argument")
    config = EngineConfig.resolve(model="m")
    assert {name: getattr(config, name) for name in TEXT_VALUES} == {k: v for k, (_, v) in TEXT_VALUES.items()}
    assert config.plugin == {"A": "one", "B": "two"} and config.model == "m"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("SEED", "x"),
        ("SEED", ""),
        ("SEED", "1.5"),
        ("SEED", "1e3"),
        ("SEED", "9" * 5000),
        ("MAX_MODEL_LEN", "none"),
        ("ENABLE_PREFIX_CACHING", "yes"),
        ("ENABLE_PREFIX_CACHING", ""),
        ("GPU_MEMORY_UTILIZATION", "most"),
        ("LIMIT_MM_PER_PROMPT", "image"),
        ("LIMIT_MM_PER_PROMPT", "image=two"),
    ],
)
def test_a_variable_that_is_no_such_value_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setenv(f"BESTIARY_{name}", text)
    with pytest.raises(SettingError, match=f"BESTIARY_{name}="):
        EngineConfig.resolve(model="m")


@pytest.mark.parametrize(
    ("name", "text"), [("seed", str(2**63)), ("block_size", "0"), ("gpu_memory_utilization", "nan"), ("dtype", "int4")]
)
def test_a_variable_out_of_range_is_refused_like_an_argument(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setenv(f"BESTIARY_{name.upper()}", text)
    with pytest.raises(SettingError, match=name):
        EngineConfig.resolve(model="m")


def test_a_choice_of_plugin_that_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BESTIARY_PLUGIN", "LlamaForCausalLM")
    with pytest.raises(SettingError, match="NAME=DISTRIBUTION"):
        EngineConfig.resolve(model="m")


def test_the_file_can_be_put_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "xdg/bestiary/config.toml", 'dtype = "float32"\n[plugin]\nA = "b"\n')
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert EngineConfig.resolve(model="m").plugin == {"A": "b"}
    monkeypatch.setenv("BESTIARY_CONFIG", str(write(tmp_path / "own.toml", "seed = 5\n")))
    config = EngineConfig.resolve(model="m")
    assert (config.seed, config.dtype, config.plugin) == (5, "auto", {})
    monkeypatch.setenv("BESTIARY_CONFIG", "~/own.toml")
    assert EngineConfig.resolve(model="m").seed == 5
    monkeypatch.setenv("BESTIARY_CONFIG", os.devnull)
    assert EngineConfig.resolve(model="m").seed == 0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("seed = ", "not a TOML file"),
        ("seed = 1\nseed = 2\n", "not a TOML file"),
        ("seeds = 1\n", "unknown setting 'seeds'; there are: allowed_local_media_path"),
        ('seed = "1"\n', "seed='1': it must be int, not str"),
        ("seed = true\n", "seed=True"),
        ("block_size = 0\n", "block_size=0"),
        ("gpu_memory_utilization = nan\n", "gpu_memory_utilization=nan"),
    ],
)
def test_a_file_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, complaint: str
) -> None:
    monkeypatch.setenv("BESTIARY_CONFIG", str(write(tmp_path / "config.toml", text)))
    with pytest.raises(SettingError, match=re.escape(complaint)):
        EngineConfig.resolve(model="m")


def test_a_file_that_is_missing_binary_or_a_folder_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BESTIARY_CONFIG", str(tmp_path / "nowhere.toml"))
    with pytest.raises(SettingError, match=r"nowhere\.toml.*no such file"):
        EngineConfig.resolve(model="m")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    monkeypatch.setenv("BESTIARY_CONFIG", str(tmp_path / "binary.toml"))
    with pytest.raises(SettingError, match=r"binary\.toml: not a TOML file"):
        EngineConfig.resolve(model="m")
    monkeypatch.setenv("BESTIARY_CONFIG", str(tmp_path))
    with pytest.raises(SettingError, match="cannot be read"):
        EngineConfig.resolve(model="m")


def test_a_setting_that_does_not_exist_is_a_type_error_with_the_list() -> None:
    with pytest.raises(TypeError, match="unknown engine setting 'block_sise'; there are: allowed_local_media_path, "):
        EngineConfig.resolve(model="m", block_sise=16)
    with pytest.raises(TypeError):
        EngineConfig.resolve()


def test_the_cache_folder_is_the_users_or_the_one_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_home() == tmp_path / ".cache/bestiary"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_home() == tmp_path / "xdg/bestiary"
    monkeypatch.setenv("BESTIARY_CACHE", "~/own")
    assert cache_home() == tmp_path / "own"


def test_errors_about_settings_are_bestiarys_own() -> None:
    assert issubclass(SettingError, BestiaryError) and issubclass(CapabilityMissing, BestiaryError)
