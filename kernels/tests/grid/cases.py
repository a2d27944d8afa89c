"""The cases of all operations: importing a module registers its own."""

from . import norm, quantised
from .draw import CASES

__all__ = ["CASES", "norm", "quantised"]
