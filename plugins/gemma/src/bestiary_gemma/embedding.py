"""Gemma 2 as a reader: a text is its last token's state, of length 1."""

from bestiary.blocks import Decoder, Pooler
from bestiary_gemma.gemma2 import NAMES, Config, trunk

__all__ = ["NAMES", "Config", "describe"]


def describe(c: Config) -> Decoder:
    """The tree of a Gemma 2 that reads."""
    return trunk(c, Pooler(tokens="last", normalise=True))
