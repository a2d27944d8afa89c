"""The cases of all operations: importing a module registers its own."""

from . import (
    activation,
    attention,
    cache_write,
    convolution,
    embedding,
    lora,
    moe,
    norm,
    quantised,
    rotary,
    sampling,
    scan,
)
from .draw import CASES

__all__ = [
    "CASES",
    "activation",
    "attention",
    "cache_write",
    "convolution",
    "embedding",
    "lora",
    "moe",
    "norm",
    "quantised",
    "rotary",
    "sampling",
    "scan",
]
