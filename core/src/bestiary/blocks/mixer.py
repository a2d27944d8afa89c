"""A block that mixes tokens of a sequence, and so keeps something between steps. Knows no way of mixing."""

from torch import Tensor

from bestiary.blocks.alibi import Alibi
from bestiary.blocks.kept import Kept
from bestiary.blocks.leaf import Block
from bestiary.blocks.rotary import Rope

__all__ = ["Mixer"]


class Mixer(Block):
    """Tokens in, tokens out, with a cache of its own. `keeps` is its own to set; the rest is set when it is built."""

    keeps: Kept
    #: Which of the batch's caches is this layer's, and which of its tables leads into it.
    slot: int = 0
    group: int = 0
    #: How queries and keys turn with the position, where they do, and the table of angles for it.
    rope: Rope | None = None
    angles: Tensor | None = None
    #: How far keys are held against them, where they are, and each head's slope.
    alibi: Alibi | None = None
    slopes: Tensor | None = None
    #: Which of the query heads this shard has; None: all.
    own_heads: range | None = None
