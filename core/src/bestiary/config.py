"""Engine settings and where they come from: argument, environment, file, default. Knows no model and no torch."""

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from bestiary.errors import SettingError
from bestiary.installed import preferences

__all__ = ["EngineConfig", "cache_home"]

EXECUTORS = ("auto", "mp", "ray")
FORMATS = ("int8", "int4")
DTYPES = ("auto", "bfloat16", "float32", "float16", "half", "float")


_WORDS: Mapping[Any, str] = {int: "number", str: "value"}


def cache_home() -> Path:
    """The folder for what Bestiary itself makes: $BESTIARY_CACHE, else the user's cache folder."""
    if own := os.environ.get("BESTIARY_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bestiary"


@dataclass(frozen=True)
class EngineConfig:
    """How to serve one model. Names and defaults are those that vLLM users know.

    A number that is None is settled from the model and the machine when the engine starts.
    """

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    revision: str | None = None
    #: auto (the checkpoint's weights), dummy (random ones, for measurements: config.json is enough).
    load_format: str = "auto"
    #: auto (what config.json says), bfloat16, float16 (half), float32 (float).
    dtype: str = "auto"
    #: Store the matrices of the layers as whole numbers of so many bits: int8, int4. None: in `dtype`.
    quantization: str | None = None
    #: auto (cuda where there is one), cpu, cuda, cuda:1, ...
    device: str = "auto"
    #: Longest prompt plus answer, in tokens; None: what the model was made for, or what the cache holds.
    max_model_len: int | None = None
    max_num_seqs: int = 256
    #: Tokens of one step: decodes and prefill chunks together.
    max_num_batched_tokens: int = 2048
    #: Tokens per block of the paged cache.
    block_size: int = 16
    enable_prefix_caching: bool = True
    #: Size of the paged cache; None: a share of what is free.
    kv_cache_memory_bytes: int | None = None
    #: The share of a GPU's memory that weights and cache may take.
    gpu_memory_utilization: float = 0.9
    #: Exact number of cache blocks, over everything else (for tests and experiments).
    num_gpu_blocks_override: int | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    #: What starts the ranks of a split model: auto (mp, and no process for one rank alone), mp (processes), ray.
    executor: str = "auto"
    #: After so many seconds without an answer to a step, ranks are taken to hang, though their processes live.
    execute_model_timeout_seconds: float = 300.0
    #: Hosts with processes, this one's number (the driver is 0), and where the others find the driver.
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29501
    #: LoRA adapters may be loaded; they cost nothing as long as none is.
    enable_lora: bool = True
    #: Adapters that can be in one batch, their largest rank, and how many are kept in memory; None: `max_loras`.
    max_loras: int = 1
    max_lora_rank: int = 16
    max_cpu_loras: int | None = None
    #: Adapters to begin with, {"name": "folder"}.
    lora_modules: Mapping[str, str] = field(default_factory=dict)
    #: The folder below which adapters must lie; None: they may lie anywhere.
    allowed_lora_path: str | None = None
    seed: int = 0
    #: The most log-probabilities that one request may ask for at each token.
    max_logprobs: int = 20
    #: "auto": default sampling parameters from generation_config.json; "none": Bestiary's own.
    generation_config: str = "auto"
    #: The most items of a modality that one prompt may bring, {"image": 2}; without it as many as the model reads.
    limit_mm_per_prompt: Mapping[str, int] = field(default_factory=dict)
    #: Hosts from which the pictures, sounds and videos of a prompt may be fetched.
    allowed_media_domains: Sequence[str] = ()
    #: The folder below which a conversation may name files.
    allowed_local_media_path: str | None = None
    #: Which distribution serves an architecture that several claim.
    plugin: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def resolve(cls, **given: Any) -> "EngineConfig":
        """Settings from arguments, then BESTIARY_<NAME> variables, then the file, then the defaults.

        The file is $BESTIARY_CONFIG, or bestiary/config.toml in the user's configuration folder. Raises TypeError for
        a name that does not exist and SettingError for a value that cannot be.
        """
        names = {f.name for f in fields(cls)}
        if unknown := sorted(set(given) - names):
            raise TypeError(f"unknown engine setting {unknown[0]!r}; there are: {', '.join(sorted(names))}")
        return cls(**{**_from_file(names), **_from_environment(names), **given})

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), kind)
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "max_model_len",
            "num_gpu_blocks_override",
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "nnodes",
            "max_loras",
            "max_lora_rank",
            "max_cpu_loras",
            "kv_cache_memory_bytes",
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SettingError(f"{name}={value}: it must be at least 1")
        if self.max_logprobs < 0:
            raise SettingError(f"max_logprobs={self.max_logprobs}: it must be at least 0")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise SettingError(f"gpu_memory_utilization={self.gpu_memory_utilization}: it must be in (0, 1]")
        if not -(2**63) <= self.seed < 2**63:
            raise SettingError(f"seed={self.seed}: it must fit in 64 bits")
        for name, dist in self.plugin.items():
            if not isinstance(name, str) or not isinstance(dist, str):
                raise SettingError(
                    f"plugin has {name!r}: {dist!r}; it maps architectures to distributions, both by name"
                )
        for name, most in self.limit_mm_per_prompt.items():
            if not isinstance(name, str) or isinstance(most, bool) or not isinstance(most, int) or most < 0:
                raise SettingError(
                    f"limit_mm_per_prompt has {name!r}: {most!r}; it maps modalities to whole numbers, 0 or more"
                )
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise SettingError(f"max_cpu_loras={self.max_cpu_loras}: it must be at least max_loras={self.max_loras}")
        for name, path in self.lora_modules.items():
            if not isinstance(name, str) or not isinstance(path, str):
                raise SettingError(f"lora_modules has {name!r}: {path!r}; it maps names to folders")
        if not all(isinstance(host, str) and host for host in self.allowed_media_domains):
            raise SettingError(f"allowed_media_domains={self.allowed_media_domains!r}: give the names of hosts")
        if self.dtype not in DTYPES:
            raise SettingError(f"dtype={self.dtype!r}: choose one of {', '.join(DTYPES)}")
        if self.load_format not in ("auto", "dummy"):
            raise SettingError(f"load_format={self.load_format!r}: choose 'auto' or 'dummy'")
        if self.quantization is not None and self.quantization not in FORMATS:
            raise SettingError(f"quantization={self.quantization!r}: choose one of {', '.join(FORMATS)}, or None")
        self._check_nodes()
        if self.generation_config not in ("auto", "none"):
            raise SettingError(f"generation_config={self.generation_config!r}: choose 'auto' or 'none'")

    def _check_nodes(self) -> None:
        if self.executor not in EXECUTORS:
            raise SettingError(f"executor={self.executor!r}: choose one of {', '.join(EXECUTORS)}")
        if not 0 < (limit := self.execute_model_timeout_seconds) <= 10**9:
            raise SettingError(f"execute_model_timeout_seconds={limit}: it must be above 0 and at most {10**9}")
        if not 0 <= self.node_rank < self.nnodes:
            raise SettingError(f"node_rank={self.node_rank}: it counts from 0 and is below nnodes={self.nnodes}")
        if not self.master_addr:
            raise SettingError("master_addr='': give the address of node 0")
        if not 0 < self.master_port < 2**16:
            raise SettingError(f"master_port={self.master_port}: a port is above 0 and below 65536")
        ranks = self.tensor_parallel_size * self.pipeline_parallel_size
        if self.node_rank == 0 and ranks % self.nnodes:  # others are told their share
            raise SettingError(f"nnodes={self.nnodes}: {ranks} ranks cannot be shared equally by as many hosts")
        if self.executor == "ray" and self.nnodes > 1:
            raise SettingError(f"nnodes={self.nnodes}: Ray finds hosts itself; leave it out with executor='ray'")


def _check_type(name: str, value: object, kind: Any) -> None:
    collection = _collection(kind)
    allowed = (collection,) if collection else getattr(kind, "__args__", (kind,))
    if float in allowed:
        allowed = (*allowed, int)
    wrong_bool = isinstance(value, bool) and bool not in allowed
    text_for_list = collection is not None and isinstance(value, str | bytes)
    if wrong_bool or text_for_list or not isinstance(value, allowed):
        wanted = " or ".join(t.__name__ for t in allowed)
        raise SettingError(f"{name}={value!r}: it must be {wanted}, not {type(value).__name__}")


def _collection(kind: Any) -> type | None:
    """Mapping or Sequence, for a setting that is one of these."""
    origin = get_origin(kind)
    return origin if origin in (Mapping, Sequence) else None


def _from_environment(names: set[str]) -> dict[str, Any]:
    hints = get_type_hints(EngineConfig)
    found = {}
    for name in names - {"model", "plugin"}:
        if (text := os.environ.get(f"BESTIARY_{name.upper()}")) is not None:
            found[name] = _parse(name, text, hints[name])
    if (text := os.environ.get("BESTIARY_PLUGIN")) is not None:
        found["plugin"] = preferences(text)
    return found


def _parse(name: str, text: str, kind: Any) -> Any:
    """The value that an environment variable stands for."""
    kinds = [k for k in getattr(kind, "__args__", (kind,)) if k is not type(None)]
    try:
        if collection := _collection(kind):
            words = [word.strip() for word in text.split(",") if word.strip()]
            make = kind.__args__[-1]  # of a list's elements, or a mapping's values
            return words if collection is Sequence else {key: make(n) for key, n in (w.split("=", 1) for w in words)}
        if kinds == [bool]:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        return kinds[0](text)
    except (KeyError, ValueError):
        wanted = f"a value of type {kinds[0].__name__}"
        if _collection(kind) or kinds == [bool]:
            wanted = "0 or 1" if kinds == [bool] else f"name={_WORDS[kind.__args__[-1]]}, with commas between"
        raise SettingError(f"BESTIARY_{name.upper()}={text!r}: it must be {wanted}") from None


def _from_file(names: set[str]) -> dict[str, Any]:
    given = os.environ.get("BESTIARY_CONFIG")
    home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    path = Path(given).expanduser() if given else home / "bestiary" / "config.toml"
    if not path.exists():
        if given:
            raise SettingError(f"BESTIARY_CONFIG={given!r}: there is no such file")
        return {}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise SettingError(f"{path}: the settings cannot be read ({e.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise SettingError(f"{path}: not a TOML file ({e})") from None
    if unknown := sorted(set(values) - names):
        raise SettingError(f"{path}: unknown setting {unknown[0]!r}; there are: {', '.join(sorted(names))}")
    return values
