"""The cases of all operations: importing a module registers its own."""

from . import lora, moe, norm
from .draw import CASES

__all__ = ["CASES", "lora", "moe", "norm"]
