"""Groups of layers that keep alike, each over a pool of blocks of its own. Knows no tensor and no sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["GONE", "CacheGroup", "longest"]

#: Stands in a table for a block that slid out of the window.
GONE = -1


@dataclass(frozen=True)
class CacheGroup:
    """What a sequence takes of one pool.

    Keys and values of every token (neither `window` nor `fixed`), of those that the last `window` tokens can see, or a
    `fixed` number of blocks however long it gets, as a state does.
    """

    num_blocks: int
    window: int | None = None
    fixed: int | None = None

    def blocks_for(self, num_tokens: int, block_size: int) -> int:
        """Entries of the table of a sequence of that length."""
        return -(-num_tokens // block_size) if self.fixed is None else self.fixed

    def first_needed(self, start: int, block_size: int) -> int:
        """The first block that a token at position `start`, or a later one, still sees."""
        return 0 if self.window is None else max(0, (start - self.window + 1) // block_size)

    def most_held(self, num_tokens: int, chunk: int, block_size: int) -> int:
        """Blocks that a sequence ever holds at once, if it grows to `num_tokens` by at most `chunk` a step."""
        all_blocks = self.blocks_for(num_tokens, block_size)
        if self.window is None:
            return all_blocks
        return min(all_blocks, self.blocks_for(self.window - 1 + chunk, block_size) + 1)


def longest(groups: Sequence[CacheGroup], chunk: int, block_size: int, limit: int) -> int:
    """The longest sequence, up to `limit` tokens, that the pools hold when nobody else is there."""
    for group in groups:
        if group.most_held(limit, chunk, block_size) > group.num_blocks:
            limit = 0 if group.fixed else min(limit, group.num_blocks * block_size)
    return limit
