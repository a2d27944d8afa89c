"""Bestiary serves open models; every architecture is a plugin. Importing this loads no model code and no torch."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bestiary.llm import LLM
    from bestiary.output import CompletionOutput, Logprob, RequestOutput
    from bestiary.sampling.params import SamplingParams

__version__ = "0.1.0"

# At the end of each operation threads wait for each other. torch's OpenMP lets them spin for milliseconds, and where
# another program wants a core two of them can share one, each spinning while the other should work. Let them sleep
# after some 20 microseconds. It is read once, when torch is loaded; whoever set it himself keeps what he set.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

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
