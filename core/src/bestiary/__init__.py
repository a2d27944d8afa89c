"""Bestiary serves open models; every architecture is a plugin. Importing this loads no model code and no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bestiary.llm import LLM
    from bestiary.output import CompletionOutput, Logprob, RequestOutput
    from bestiary.sampling.params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "bestiary.llm",
    "CompletionOutput": "bestiary.output",
    "Logprob": "bestiary.output",
    "RequestOutput": "bestiary.output",
    "SamplingParams": "bestiary.sampling.params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bestiary' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
