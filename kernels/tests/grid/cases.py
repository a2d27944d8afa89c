"""The cases of all operations: importing a module registers its own."""

from . import attention, norm
from .draw import CASES

__all__ = ["CASES", "attention", "norm"]
