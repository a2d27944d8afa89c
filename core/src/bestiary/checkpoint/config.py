"""config.json and generation_config.json, read typed and strict. Knows no architecture, and what no key means.

Keys that nobody asks for are ignored, those that would load code (`auto_map`) among them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_origin, overload

from bestiary.checkpoint.jsonfile import read_object, shown
from bestiary.errors import ConfigUnsupported

__all__ = ["ConfigFile", "RopeSettings", "generation"]

T = TypeVar("T")

#: One key, or several spellings of which the first that is there counts; a dot leads into a nested object.
Key = str | tuple[str, ...]

_LIMIT_BYTES = 10_000_000

_WORDS = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false"}

_ROPE_NUMBERS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)


@dataclass(frozen=True)
class RopeSettings:
    """Rotary position embedding as a configuration sets it, whichever dialect it is written in.

    None, or an empty tuple, stands for a number that the configuration does not give.
    """

    theta: float
    #: "default" or the way in which angles are stretched, in the configuration's own word.
    type: str = "default"
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    #: Tokens in the context before the stretch; where nothing says it, the model's whole context.
    original_max_position_embeddings: int | None = None
    partial_rotary_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    #: Frequencies that turn with each of several axes of positions; one axis where there are none.
    mrope_section: tuple[int, ...] = ()
    #: File and key that errors name.
    source: str = field(default="config.json", compare=False, repr=False)

    def need(self, name: str) -> float:
        """The number of that name. Raises ConfigUnsupported, naming the key, where there is none."""
        value: float | None = getattr(self, name)
        if value is None:
            raise ConfigUnsupported(f"{self.source}.{name} is missing; the rope type {self.type!r} needs it")
        return value


class ConfigFile:
    """One JSON object of somebody else's, its keys read with the type that they must have.

    `need` and `get` take int, float (an integer will do), str, bool, dict or `tuple[X, ...]` of these. A null counts as
    absent. ConfigUnsupported, naming file and key, is raised for whatever does not fit.
    """

    def __init__(self, values: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        #: What was read, for predicates that look for themselves.
        self.values: Mapping[str, Any] = MappingProxyType(dict(values))
        self.path = path
        self._prefix = prefix

    @classmethod
    def load(cls, folder: Path, name: str = "config.json") -> "ConfigFile":
        """Read the folder's config.json, or its neighbour of that name.

        Raises CheckpointNotFound where there is none, and CheckpointMalformed where it is no JSON object.
        """
        return cls(read_object(folder / name, _LIMIT_BYTES), folder / name)

    @property
    def architectures(self) -> tuple[str, ...]:
        """The names of the architectures that the checkpoint says it has; none where it does not say."""
        return self.get("architectures", tuple[str, ...], ())

    @property
    def dtype(self) -> str | None:
        """The dtype of the weights in torch's words ("bfloat16"), or None where the file does not say."""
        name = self.get(("dtype", "torch_dtype"), str)
        return None if name is None else name.removeprefix("torch.")

    def __contains__(self, key: str) -> bool:
        return self._look_up(key) is not None

    def need(self, key: Key, kind: type[T], *, infinite: bool = False) -> T:
        """The value of a key that must be there. `infinite` lets a float be infinite; NaN is never let through."""
        found = self._find(key)
        if found is None:
            raise self._error(key, f"is missing; it must be {_word(kind)}")
        return self._typed(*found, kind, infinite)

    @overload
    def get(self, key: Key, kind: type[T], *, infinite: bool = False) -> T | None: ...
    @overload
    def get(self, key: Key, kind: type[T], default: T, *, infinite: bool = False) -> T: ...
    def get(self, key: Key, kind: type[T], default: T | None = None, *, infinite: bool = False) -> T | None:
        """The value of a key, or `default` where it is absent or null."""
        found = self._find(key)
        return default if found is None else self._typed(*found, kind, infinite)

    def size(self, key: Key, default: int | None = None) -> int:
        """A number of things, at least 1; `default` where the key is absent or null, else it must be there."""
        value = self.need(key, int) if default is None else self.get(key, int, default)
        if value < 1:
            raise self._error(key, f"is {value}; it must be at least 1")
        return value

    def must(self, holds: bool, key: Key, what: str) -> None:
        """Raise ConfigUnsupported, that says `what` of a key, unless a condition between values holds."""
        if not holds:
            raise self._error(key, what)

    def expect(self, key: Key, *allowed: T, default: T | None = None) -> T:
        """The value of a key of which only some values are supported.

        Where it is absent: `default` if that is given, or None if that is among the allowed.
        """
        found = self._find(key)
        if found is None and (default is not None or None in allowed):
            return default  # type: ignore[return-value]  # None is then one of the allowed
        supported = f"supported: {', '.join(map(shown, allowed))}"
        if found is None:
            raise self._error(key, f"is missing; {supported}")
        name, value = found
        # 1 and True are equal in Python, and two things in JSON.
        for choice in allowed:
            if value == choice and isinstance(value, bool) == isinstance(choice, bool):
                return choice
        raise self._error(name, f"is {shown(value)}; {supported}")

    def section(self, key: Key) -> "ConfigFile":
        """The nested object of a key that must be there; errors name its keys in full."""
        found = self._find(key)
        if found is None:
            raise self._error(key, "is missing; it must be an object")
        name, value = found
        return ConfigFile(self._typed(name, value, dict, False), self.path, f"{self._prefix}{name}.")

    def filled(self, defaults: Mapping[str, Any]) -> "ConfigFile":
        """This object with keys that it leaves out; a null is left as it is, since that may be what differs.

        Some configurations hold only what differs from their class's own.
        """
        return ConfigFile({**defaults, **self.values}, self.path, self._prefix)

    def token_ids(self, key: Key) -> tuple[int, ...]:
        """A key that holds one token id or a list of them; none where it is absent."""
        found = self._find(key)
        if found is None:
            return ()
        name, value = found
        return self._typed(name, value if isinstance(value, list) else [value], tuple[int, ...], False)

    def rope(self, theta: float = 10000.0) -> RopeSettings:
        """Rotary settings, from `rope_theta` and `rope_scaling` or from `rope_parameters` (transformers 5).

        `theta` is the base where the file gives none. Where both dialects stand side by side, `rope_scaling` holds, as
        in transformers.
        """
        name = "rope_scaling" if self.values.get("rope_scaling") else "rope_parameters"
        scaling = self.section(name) if self.values.get(name) else ConfigFile({}, self.path, f"{self._prefix}{name}.")
        if any(isinstance(value, dict) for value in scaling.values.values()):
            raise self._error(name, "differs from layer to layer; only one setting for all layers is supported")
        context = (
            "original_max_position_embeddings",
            f"{name}.original_max_position_embeddings",
            "max_position_embeddings",
        )
        return RopeSettings(
            theta=self.get((f"{name}.rope_theta", "rope_parameters.rope_theta", "rope_theta"), float, theta),
            type=scaling.get(("rope_type", "type"), str, "default"),
            truncate=scaling.get("truncate", bool, True),
            original_max_position_embeddings=self.get(context, int),
            partial_rotary_factor=self.get((f"{name}.partial_rotary_factor", "partial_rotary_factor"), float),
            short_factor=scaling.get("short_factor", tuple[float, ...], ()),
            long_factor=scaling.get("long_factor", tuple[float, ...], ()),
            mrope_section=scaling.get("mrope_section", tuple[int, ...], ()),
            source=f"{self.path}: {self._prefix}{name}",
            **{number: scaling.get(number, float) for number in _ROPE_NUMBERS},
        )

    def _look_up(self, key: str) -> Any:
        """The value of one dotted key, None where it or what should hold it is absent or null."""
        value: Any = self.values
        at = ""
        for step in key.split("."):
            if value is None:
                return None
            if not isinstance(value, Mapping):
                raise self._error(at, f"is {shown(value)}; it must be an object")
            value, at = value.get(step), f"{at}.{step}".lstrip(".")
        return value

    def _find(self, key: Key) -> tuple[str, Any] | None:
        """The first spelling of a key that is there, and its value."""
        for name in (key,) if isinstance(key, str) else key:
            if (value := self._look_up(name)) is not None:
                return name, value
        return None

    def _typed(self, name: str, value: Any, kind: type[T], infinite: bool) -> T:
        typed = _convert(value, kind, infinite)
        if typed is None:
            raise self._error(name, f"is {shown(value)}; it must be {_word(kind)}")
        return typed  # type: ignore[no-any-return]

    def _error(self, key: Key, what: str) -> ConfigUnsupported:
        names = (key,) if isinstance(key, str) else key
        return ConfigUnsupported(f"{self.path}: {' or '.join(self._prefix + name for name in names)} {what}")


def generation(folder: Path) -> dict[str, Any]:
    """What the folder's generation_config.json says about sampling and stopping; empty without the file.

    Keys, each only where the file has it: eos_token_id (a tuple of ints), bos_token_id, pad_token_id, top_k,
    max_new_tokens (ints), temperature, top_p, min_p, repetition_penalty (floats). Others are ignored.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return {}
    file = ConfigFile.load(folder, path.name)
    found: dict[str, Any] = {"eos_token_id": file.token_ids("eos_token_id") or None}
    for key in ("bos_token_id", "pad_token_id", "top_k", "max_new_tokens"):
        found[key] = file.get(key, int)
    for key in ("temperature", "top_p", "min_p", "repetition_penalty"):
        found[key] = file.get(key, float)
    return {key: value for key, value in found.items() if value is not None}


def _convert(value: Any, kind: Any, infinite: bool) -> Any:
    """The value as `kind`, or None where it is something else. No JSON value that is there becomes None."""
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            return None
        items = [_convert(item, get_args(kind)[0], infinite) for item in value]
        return None if any(item is None for item in items) else tuple(items)
    if kind is float and type(value) is int:
        # Beyond 2^1024 an integer has no float.
        return float(value) if abs(value) < 2**1023 else None
    if type(value) is not kind:
        return None
    if kind is float and not math.isfinite(value):
        return value if infinite and math.isinf(value) else None
    return value


def _word(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a list, each item {_word(get_args(kind)[0])}"
    return _WORDS.get(kind, "an object")
