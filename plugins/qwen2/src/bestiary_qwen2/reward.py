"""Qwen2 as a judge: a small network gives every token a number, and the last token's stands for the whole."""

from bestiary.blocks import Decoder, Pooler, Scores
from bestiary.checkpoint import Names
from bestiary_qwen2 import qwen2
from bestiary_qwen2.qwen2 import Config

__all__ = ["NAMES", "Config", "describe"]


def describe(c: Config) -> Decoder:
    """The tree of a Qwen2 that judges."""
    scores = Scores(c.hidden_size, 1, inner=c.hidden_size, act="relu")
    return qwen2.trunk(c, Pooler(tokens="all", scores=scores))


NAMES = qwen2.NAMES + Names(
    ("score.0", "head.scores.inner"),
    ("score.2", "head.scores.out"),
)
