"""The cases of all operations: importing a module registers its own."""

from . import (
    activation,
    attention,
    cache_write,
    embedding,
    moe,
    norm,
    rotary,
    sampling,
)
from .draw import CASES

__all__ = [
    "CASES",
    "activation",
    "attention",
    "cache_write",
    "embedding",
    "moe",
    "norm",
    "rotary",
    "sampling",
]
