"""What a plugin declares about an architecture: data. Imports nothing heavy and knows nothing of how models run."""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from bestiary.errors import PluginBroken

__all__ = ["API", "Architecture", "Modality", "Task", "Variant"]

#: The version of the contract between core and plugins. It rises when a plugin written for the old one would break.
API = 1


class Task(StrEnum):
    """What a model produces."""

    GENERATE = "generate"
    EMBED = "embed"
    CLASSIFY = "classify"
    REWARD = "reward"


@dataclass(frozen=True)
class Modality:
    """What a model reads beside text, and in which forms."""

    #: Several items may stand in one prompt.
    many: bool = False
    #: Ready embeddings are taken instead of raw items.
    embeddings: bool = False


@dataclass(frozen=True)
class Variant:
    """One of several models that share one architecture string, told apart by the parsed config.json."""

    when: Callable[[Mapping[str, Any]], bool]
    model: str


@dataclass(frozen=True)
class Architecture:
    """One architecture as a plugin declares it.

    `name` is the string that stands in config.json's `architectures`; `aliases` are other spellings, each with an entry
    point of its own. `model` is the dotted name of the module with `Config`, `describe` and `NAMES`; only the process
    that runs the model imports it. `processor` is that of the module whose `Processor` makes tokens and inputs of a
    prompt, where a tokenizer alone cannot; `proof` that of the module whose CASES the conformance kit runs. `tasks` may
    be given as any set; it is kept frozen, as are `modalities`. Raises PluginBroken for a declaration that cannot be
    meant.
    """

    name: str
    model: str
    tasks: Set[Task]
    modalities: Mapping[str, Modality] = field(default_factory=dict)
    lora: bool = False
    pipeline: bool = False
    tensor: bool = False
    examples: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()
    processor: str | None = None
    proof: str | None = None
    api: int = API

    def __post_init__(self) -> None:
        # Frozen for its users from here on; only the declaration itself still writes.
        object.__setattr__(self, "tasks", frozenset(self.tasks))
        object.__setattr__(self, "modalities", MappingProxyType(dict(self.modalities)))
        for key, problem in self._problems().items():
            if problem:
                raise PluginBroken(f"Architecture {self.name!r}: {key}={getattr(self, key)!r} must be {problem}.")

    def module_for(self, config: Mapping[str, Any]) -> str:
        """The dotted name of the module that runs a checkpoint with this parsed config.json."""
        return next((variant.model for variant in self.variants if variant.when(config)), self.model)

    def _problems(self) -> dict[str, str | None]:
        """What each field must be, where it is not."""
        tuples = ("examples", "aliases", "variants")
        is_modality = (isinstance(modality, Modality) for modality in self.modalities.values())
        return {
            "name": None if _is_word(self.name) else "the string that stands in config.json's architectures",
            "model": None if _is_word(self.model) else "the dotted name of a module",
            "tasks": None if self.tasks and self.tasks <= set(Task) else "a set of at least one Task",
            "modalities": None if all(is_modality) else "a mapping of names to Modality",
            "api": None if type(self.api) is int else "a whole number, such as bestiary.architecture.API",
            # A lone string would be taken for a tuple of its letters.
            **{key: None if isinstance(getattr(self, key), tuple) else "a tuple" for key in tuples},
        }


def _is_word(value: object) -> bool:
    return isinstance(value, str) and value != "" and not any(letter.isspace() for letter in value)
