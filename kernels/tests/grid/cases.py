"""The cases of all operations: importing a module registers its own."""

from . import convolution, norm, scan
from .draw import CASES

__all__ = ["CASES", "convolution", "norm", "scan"]
