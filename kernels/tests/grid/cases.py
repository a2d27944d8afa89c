"""The cases of all operations: importing a module registers its own."""

from . import moe, norm
from .draw import CASES

__all__ = ["CASES", "moe", "norm"]
