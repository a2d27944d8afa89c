"""Block tables: which blocks hold a sequence's tokens, and which of them another sequence has filled already.

Knows nothing of scheduling or tensors. A table's tokens lie in three half-open regions:

    [0, published)      full blocks that anybody may find; never written again
    [published, used)   blocks of this table alone, being filled
    [used, ...)         not stored
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from struct import pack

from bestiary.cache.blocks import BlockPool

__all__ = ["BlockTable", "PagedCache", "root_key"]


def root_key(salt: str = "") -> bytes:
    """The key above a prompt's first block; tenants with different salts share nothing."""
    return _digest(b"root", salt.encode(errors="surrogatepass"))


def _digest(tag: bytes, *parts: bytes) -> bytes:
    """SHA-256 over tagged, length-prefixed fields, so that no two different lists of fields read alike."""
    return sha256(b"".join(pack("<Q", len(part)) + part for part in (tag, *parts))).digest()


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence, in order, and the keys of those that were hashed."""

    root: bytes
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    published: int = 0


class PagedCache:
    """The cache as the scheduler sees it: can these tokens be stored, and how many are here already."""

    def __init__(self, pool: BlockPool, *, share_prefixes: bool) -> None:
        self.pool, self._share = pool, share_prefixes

    @property
    def capacity(self) -> int:
        """Tokens that the whole cache holds."""
        return self.pool.num_blocks * self.pool.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that this many tokens fill."""
        return -(-num_tokens // self.pool.block_size)

    def match(self, table: BlockTable, tokens: Sequence[int]) -> int:
        """Fill an empty table with the blocks that hold a prefix of `tokens`; return the number of tokens they hold.

        The last token is never taken from the cache: it must be computed for its logits.
        """
        if not self._share:
            return 0
        for index in range((len(tokens) - 1) // self.pool.block_size):
            key = self._key(table, tokens, index)
            block = self.pool.find(key, self._tokens_of(tokens, index))
            if block is None:
                break
            self.pool.hold(block)
            table.blocks.append(block)
        table.published = len(table.blocks)
        return table.published * self.pool.block_size

    def reserve(self, table: BlockTable, num_tokens: int) -> bool:
        """Make room for `num_tokens` in total. False, and nothing changed, when there are not enough free blocks."""
        missing = self.blocks_for(num_tokens) - len(table.blocks)
        if missing > 0:
            taken = self.pool.take(missing)
            if taken is None:
                return False
            table.blocks.extend(taken)
        return True

    def publish(self, table: BlockTable, tokens: Sequence[int], num_computed: int) -> None:
        """Let others find the blocks that are full now. Call it only when the step that filled them has ended well."""
        if not self._share:
            return
        for index in range(table.published, num_computed // self.pool.block_size):
            self.pool.publish(table.blocks[index], self._key(table, tokens, index), self._tokens_of(tokens, index))
            table.published = index + 1

    def forget(self, table: BlockTable) -> None:
        """Let nobody find this table's blocks any more: what they hold turned out to be wrong."""
        self.pool.forget(table.blocks)

    def release(self, table: BlockTable) -> None:
        """Give all blocks back; the table is empty afterwards and may be used again."""
        self.pool.drop(reversed(table.blocks))
        table.blocks.clear()
        table.published = 0

    def _tokens_of(self, tokens: Sequence[int], index: int) -> Sequence[int]:
        size = self.pool.block_size
        return tokens[index * size : (index + 1) * size]

    def _key(self, table: BlockTable, tokens: Sequence[int], index: int) -> bytes:
        """The chained key of a full block; a sequence's tokens only grow, so each is hashed once."""
        if index == len(table.keys):
            parent = table.keys[index - 1] if index else table.root
            block = self._tokens_of(tokens, index)
            table.keys.append(_digest(b"block", parent, pack(f"<{len(block)}q", *block)))
        return table.keys[index]
