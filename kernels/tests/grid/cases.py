"""The cases of all operations: importing a module registers its own."""

from . import (
    activation,
    attention,
    cache_write,
    convolution,
    embedding,
    heads,
    lora,
    moe,
    norm,
    pointwise,
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
    "heads",
    "lora",
    "moe",
    "norm",
    "pointwise",
    "quantised",
    "rotary",
    "sampling",
    "scan",
]
