"""Groups of layers that keep alike, each over a pool of blocks of its own. Knows no tensor and no sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["GONE", "CacheGroup", "longest"]

#: Stands in a table for a block that slid out of the window.
GONE = -1


@dataclass(frozen=True)
class CacheGroup:
    """What a sequence takes of one pool.

    Keys and values of every token, or of those that the last `window` tokens can see; a `fixed` number of blocks
    however long it gets, as a state does; or those of at most `crossed` vectors that it looks at beside its tokens.
    """

    num_blocks: int
    window: int | None = None
    fixed: int | None = None
    crossed: int | None = None

    @property
    def is_constant(self) -> bool:
        """A sequence takes the same number of blocks from its first token to its last."""
        return self.fixed is not None or self.crossed is not None

    def blocks_for(self, num_tokens: int, num_crossed: int, block_size: int) -> int:
        """Entries of the table of a sequence of that length, that looks at so many other vectors."""
        if self.fixed is not None:
            return self.fixed
        return -(-(num_tokens if self.crossed is None else num_crossed) // block_size)

    def first_needed(self, start: int, block_size: int) -> int:
        """The first block that a token at position `start`, or a later one, still sees."""
        return 0 if self.window is None else max(0, (start - self.window + 1) // block_size)

    def most_held(self, num_tokens: int, chunk: int, block_size: int) -> int:
        """Blocks that a sequence ever holds at once, if it grows to `num_tokens` by at most `chunk` a step."""
        all_blocks = self.blocks_for(num_tokens, self.crossed or 0, block_size)
        if self.window is None:
            return all_blocks
        return min(all_blocks, -(-(self.window - 1 + chunk) // block_size) + 1)


def longest(groups: Sequence[CacheGroup], chunk: int, block_size: int, limit: int) -> int:
    """The longest sequence, up to `limit` tokens, that the pools hold when nobody else is there."""
    for group in groups:
        if group.most_held(limit, chunk, block_size) > group.num_blocks:
            limit = 0 if group.is_constant else min(limit, group.num_blocks * block_size)
    return limit
