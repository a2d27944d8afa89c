"""Block tables: which blocks hold a sequence's tokens, and which of them another sequence has filled already.

Knows nothing of scheduling or tensors. A table has a list of blocks for each group of layers. Its tokens lie in three
half-open regions:

    [0, published)      full blocks that anybody may find; never written again
    [published, used)   blocks of this table alone, being filled
    [used, ...)         not stored

Where a group has a window, blocks that no later token can see are given back and stand as GONE.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from struct import pack

from bestiary.cache.blocks import BlockPool
from bestiary.cache.groups import GONE, CacheGroup, longest
from bestiary.inputs import NOTHING, Inputs

__all__ = ["BlockTable", "PagedCache", "root_key"]


def root_key(salt: str = "", seen: Iterable[bytes] = (), *, adapter: bytes = b"") -> bytes:
    """The key above a prompt's first block; tenants with different salts share nothing, nor do different adapters.

    `seen` are digests of what every token looks at, `adapter` that of the content of the adapter.
    """
    return _digest(b"root", salt.encode(errors="surrogatepass"), adapter, *seen)


def _digest(tag: bytes, *parts: bytes) -> bytes:
    """SHA-256 over tagged, length-prefixed fields, so that no two different lists of fields read alike."""
    return sha256(b"".join(pack("<Q", len(part)) + part for part in (tag, *parts))).digest()


def _spans_of(inputs: Inputs, start: int, end: int) -> Iterator[bytes]:
    """What the tokens `start` to `end` stand for beside themselves: which take which vectors of which item."""
    for span in inputs.spans:
        places, which = span.between(start, end)
        if places:
            yield pack(f"<q{len(places)}q", which.start, *(place - start for place in places)) + span.item.digest


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence, in order and by group, and the keys of those that were hashed."""

    root: bytes
    #: One list for each group; none at all while nothing is stored.
    blocks: list[list[int]] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    published: int = 0
    #: What the prompt brings beside its tokens, which the keys depend on too.
    inputs: Inputs = NOTHING

    def of(self, group: int) -> Sequence[int]:
        """The blocks of one group."""
        return self.blocks[group] if self.blocks else ()


class PagedCache:
    """The cache as the scheduler sees it: can these tokens be stored, and how many are here already."""

    def __init__(self, groups: Sequence[CacheGroup], block_size: int, *, share_prefixes: bool) -> None:
        self.groups, self.block_size = groups, block_size
        self.pools = [BlockPool(group.num_blocks, block_size) for group in groups]
        # A state is the sum of all that came before: no part of it belongs to a prefix alone.
        self._share = share_prefixes and all(group.fixed is None for group in groups)
        # What a sequence looks at beside its tokens is not shared block by block: its table's root speaks of it.
        self._shared = [g for g, group in enumerate(groups) if not group.is_constant]
        self._windowed = [g for g, group in enumerate(groups) if group.window is not None]
        self._fixed = [g for g, group in enumerate(groups) if group.fixed is not None]

    @property
    def is_empty(self) -> bool:
        """Nobody holds a block."""
        return all(pool.num_free == pool.num_blocks for pool in self.pools)

    def longest(self, chunk: int, limit: int) -> int:
        """The longest sequence, up to `limit` tokens, that fits when alone and computed `chunk` tokens a step."""
        return longest(self.groups, chunk, self.block_size, limit)

    def match(self, table: BlockTable, tokens: Sequence[int]) -> int:
        """Fill an empty table with the blocks that hold a prefix of `tokens`; return the number of tokens they hold.

        The last token is never taken from the cache: it must be computed for its logits.
        """
        if not self._share:
            return 0
        found = self._find(table, tokens)
        if count := self._usable(found):
            size = self.block_size
            table.blocks = [[] for _ in self.groups]
            for g, blocks in zip(self._shared, found, strict=True):
                first = self.groups[g].first_needed(count * size, size)
                kept = [block for block in blocks[first:count] if block is not None]
                for block in kept:
                    self.pools[g].hold(block)
                table.blocks[g] = [GONE] * first + kept
        table.published = count
        return count * self.block_size

    def _find(self, table: BlockTable, tokens: Sequence[int]) -> list[list[int | None]]:
        """For each shared group the block of each full block of tokens, as far as all without a window have it."""
        found: list[list[int | None]] = [[] for _ in self._shared]
        for index in range((len(tokens) - 1) // self.block_size):
            key, content = self._key(table, tokens, index), self._tokens_of(tokens, index)
            here = [self.pools[g].find(key, content) for g in self._shared]
            if any(
                block is None and self.groups[g].window is None for block, g in zip(here, self._shared, strict=True)
            ):
                break
            for blocks, block in zip(found, here, strict=True):
                blocks.append(block)
        return found

    def _usable(self, found: list[list[int | None]]) -> int:
        """The most blocks of tokens after which every group still has all that the next token sees."""
        size, best = self.block_size, 0
        runs = [0] * len(self._shared)  # how many blocks without a gap end here
        for count in range(1, len(found[0]) + 1):
            for g, blocks in enumerate(found):
                runs[g] = runs[g] + 1 if blocks[count - 1] is not None else 0
            if all(
                run >= count - self.groups[g].first_needed(count * size, size)
                for run, g in zip(runs, self._shared, strict=True)
            ):
                best = count
        return best

    def reserve(self, table: BlockTable, start: int, end: int, *, spare: int = 0) -> bool:
        """Make room for tokens `start` to `end`, and give back what no token from `start` on sees.

        False, and no block taken, where there are not enough, with `spare` blocks left in each pool that grows.
        """
        if self._windowed:
            self._slide(table, start)
        if self._has(table, end):
            return True
        return self._take(table, end, spare)

    def _has(self, table: BlockTable, end: int) -> bool:
        """There is room for that many tokens already, as there is in most decode steps."""
        if not table.blocks:
            return False
        for g in self._shared:  # noqa: SIM110 - a generator would take as long as the rest of a decode step's reserve
            if len(table.blocks[g]) * self.block_size < end:
                return False
        return True

    def _take(self, table: BlockTable, end: int, spare: int) -> bool:
        """Take what is missing from every pool, or from none."""
        table.blocks = table.blocks or [[] for _ in self.groups]
        size = self.block_size
        wanted = [
            group.blocks_for(end, table.inputs.num_crossed, size) - len(blocks)
            for group, blocks in zip(self.groups, table.blocks, strict=True)
        ]
        for group, pool, missing in zip(self.groups, self.pools, wanted, strict=True):
            if missing > 0 and missing + (0 if group.is_constant else spare) > pool.num_free:
                return False
        for g, (pool, missing) in enumerate(zip(self.pools, wanted, strict=True)):
            taken = pool.take(missing) if missing > 0 else []
            if taken is None:
                for blocks, other, count in zip(table.blocks[:g], self.pools, wanted, strict=False):
                    self._give_back(other, blocks, count)
                return False
            table.blocks[g].extend(taken)
        return True

    @staticmethod
    def _give_back(pool: BlockPool, blocks: list[int], count: int) -> None:
        """Undo the taking of `count` blocks."""
        for _ in range(max(count, 0)):
            pool.drop([blocks.pop()])

    def _slide(self, table: BlockTable, start: int) -> None:
        """Give back the blocks that tokens from `start` on do not see."""
        for g in self._windowed if table.blocks else ():
            blocks = table.blocks[g]
            for index in range(self.groups[g].first_needed(start, self.block_size) - 1, -1, -1):
                if blocks[index] == GONE:
                    break
                self.pools[g].drop([blocks[index]])
                blocks[index] = GONE

    def commit(self, table: BlockTable, tokens: Sequence[int], num_computed: int) -> None:
        """The step that computed the tokens up to `num_computed` ended well: others may find what is full now.

        A state was read from one of its blocks and written to the other, so that a step that fails can be repeated.
        """
        for g in self._fixed:
            table.blocks[g].reverse()
        for index in range(table.published, num_computed // self.block_size if self._share else 0):
            key, content = self._key(table, tokens, index), self._tokens_of(tokens, index)
            for g in self._shared:
                self.pools[g].publish(table.blocks[g][index], key, content)
            table.published = index + 1

    def forget(self, table: BlockTable) -> None:
        """Let nobody find this table's blocks any more: what they hold turned out to be wrong."""
        for pool, blocks in zip(self.pools, table.blocks, strict=False):
            pool.forget(blocks)

    def release(self, table: BlockTable) -> None:
        """Give all blocks back; the table is empty afterwards and may be used again."""
        for pool, blocks in zip(self.pools, table.blocks, strict=False):
            pool.drop(block for block in reversed(blocks) if block != GONE)
        table.blocks.clear()
        table.published = 0

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Raise EngineError unless the pools' books agree with the tables of all holders."""
        held = list(tables)
        for g, pool in enumerate(self.pools):
            pool.check_integrity([block for block in table.of(g) if block != GONE] for table in held)

    def _tokens_of(self, tokens: Sequence[int], index: int) -> Sequence[int]:
        size = self.block_size
        return tokens[index * size : (index + 1) * size]

    def _key(self, table: BlockTable, tokens: Sequence[int], index: int) -> bytes:
        """The chained key of a full block; a sequence's tokens only grow, so each is hashed once."""
        if index == len(table.keys):
            parent = table.keys[index - 1] if index else table.root
            block = self._tokens_of(tokens, index)
            within = _spans_of(table.inputs, index * self.block_size, (index + 1) * self.block_size)
            table.keys.append(_digest(b"block", parent, pack(f"<{len(block)}q", *block), *within))
        return table.keys[index]
