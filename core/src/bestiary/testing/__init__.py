"""What tests of Bestiary and of its plugins are made with. Nothing that serves a user imports it; it loads lazily."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bestiary.testing.cases import Case, Naming, Waiver
    from bestiary.testing.conformance import Conformance
    from bestiary.testing.fake_model import Expected, FakeExecutor, expected_answer, expected_prompt_logprobs
    from bestiary.testing.references import Transformers, last_token, never
    from bestiary.testing.samples import Sample, film, picture, sound

__all__ = [
    "Case",
    "Conformance",
    "Expected",
    "FakeExecutor",
    "Naming",
    "Sample",
    "Transformers",
    "Waiver",
    "expected_answer",
    "expected_prompt_logprobs",
    "film",
    "last_token",
    "never",
    "picture",
    "sound",
]

_HOMES = {
    "cases": ("Case", "Naming", "Waiver"),
    "conformance": ("Conformance",),
    "fake_model": ("Expected", "FakeExecutor", "expected_answer", "expected_prompt_logprobs"),
    "references": ("Transformers", "last_token", "never"),
    "samples": ("Sample", "film", "picture", "sound"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"bestiary.testing.{module}"), name)
    raise AttributeError(f"module 'bestiary.testing' has no attribute {name!r}")
