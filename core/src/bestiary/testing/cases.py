"""What a plugin brings to prove itself: small configurations, and who knows the right answer. Imports nothing heavy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bestiary.testing.references import Reference
from bestiary.testing.samples import Sample

__all__ = ["Case", "Naming", "Waiver"]


@dataclass(frozen=True)
class Waiver:
    """Why a check is switched off, and where that is written down. It stands in the report."""

    reason: str
    link: str


@dataclass(frozen=True)
class Naming:
    """Another generation of tensor names: what regular expressions make of those that the reference saves.

    Each of `rewrites` is (pattern, replacement); a name that becomes "" is left out. `repeats` are (old, new): the
    tensor stands in the file under the new name as well.
    """

    name: str
    rewrites: tuple[tuple[str, str], ...] = ()
    repeats: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Case:
    """One configuration of an architecture, as published but small, and its reference.

    `mutations` says for each feature which keys of config.json switch it off (None: the key is left out): with the same
    weights the answer must then be another one, or loading must fail. Heads have at least 32 numbers.
    """

    name: str
    config: Mapping[str, Any]
    reference: Reference
    mutations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    namings: tuple[Naming, ...] = ()
    #: Tokens of the prompt: more than a window, where there is one.
    prompt_length: int = 24
    #: The prompts, where tokens drawn at random are none: the first has an item of each modality.
    samples: Callable[[], Sequence[Sample]] | None = None
    #: Files beside config.json, as JSON: {"preprocessor_config.json": {...}}.
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    #: What `multi_modal_embeds` is, of a prompt's items (each with its tensors) and the vectors of each; without it, by
    #: modality the list of vectors.
    embeddings: Callable[[Sequence[Any], Sequence[Any]], Mapping[str, Any]] | None = None
    #: By name of a check.
    without: Mapping[str, Waiver] = field(default_factory=dict)
