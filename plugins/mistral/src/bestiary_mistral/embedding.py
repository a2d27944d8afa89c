"""Mistral as a reader (Wang et al. 2023, arXiv 2401.00368): a text is its last token's state, of length 1."""

from bestiary.blocks import Decoder, Pooler
from bestiary_mistral.mistral import NAMES, Config, trunk

__all__ = ["NAMES", "Config", "describe"]


def describe(c: Config) -> Decoder:
    """The tree of a Mistral that reads."""
    return trunk(c, Pooler(tokens="last", normalise=True))
