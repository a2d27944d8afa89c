"""The pool of cache blocks: reference counts, a free list in order of last use, and blocks findable by content.

Knows nothing of requests or tensors: a block is a number. Every block is in exactly one of three states:

    held    references > 0; it may be findable as well (shared prefix)
    cached  references = 0, findable; free to take, and the least recently used one goes first
    blank   references = 0, not findable; taken before any cached one
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from bestiary.errors import EngineError

__all__ = ["BlockPool"]


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens. Every operation is O(1) for each block it touches."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._references = [0] * num_blocks
        self._blank = list(range(num_blocks))[::-1]  # a stack: the memory that was touched last is taken first
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._by_key: dict[bytes, int] = {}
        self._content: dict[int, tuple[bytes, tuple[int, ...]]] = {}  # findable block -> its key and tokens

    @property
    def num_free(self) -> int:
        """Blocks that can be taken now, cached ones included."""
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Free blocks whose content can still be found."""
        return len(self._cached)

    def take(self, n: int) -> list[int] | None:
        """Take `n` blocks with one reference each, or none at all: None when fewer are free."""
        if n > self.num_free:
            return None
        taken = []
        for _ in range(n):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._unname(block)
            self._references[block] = 1
            taken.append(block)
        return taken

    def hold(self, block: int) -> None:
        """Add a reference to a block that `find` returned."""
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1

    def drop(self, blocks: Iterable[int]) -> None:
        """Give back one reference of each. Give a sequence's last block first: a prefix is evicted from its tail."""
        for block in blocks:
            if self._references[block] < 1:
                raise EngineError(f"cache block {block} was given back more often than it was taken")
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._content:
                    self._cached[block] = None
                else:
                    self._blank.append(block)

    def publish(self, block: int, key: bytes, tokens: Sequence[int]) -> None:
        """Make a held, filled block findable. Where its content is findable already the older block keeps the name:
        a table only ever grows, so nobody is moved to the other block.
        """
        if key not in self._by_key and block not in self._content:
            self._by_key[key] = block
            self._content[block] = (key, tuple(tokens))

    def find(self, key: bytes, tokens: Sequence[int]) -> int | None:
        """The block that holds exactly this content. The tokens are compared too: no trust in the digest alone."""
        block = self._by_key.get(key)
        if block is None or self._content[block][1] != tuple(tokens):
            return None
        return block

    def forget(self, blocks: Iterable[int]) -> None:
        """Let nobody find these held blocks any more."""
        for block in blocks:
            if block in self._content:
                self._unname(block)

    def clear(self) -> None:
        """Forget all content. Blocks in use stay with their holders."""
        self._blank.extend(self._cached)
        self._cached.clear()
        self._by_key.clear()
        self._content.clear()

    def _unname(self, block: int) -> None:
        key, _ = self._content.pop(block)
        del self._by_key[key]

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise EngineError unless the pool's books agree with the tables of all holders."""
        held = [0] * self.num_blocks
        for table in tables:
            for block in table:
                held[block] += 1
        if held != self._references:
            block = next(b for b in range(self.num_blocks) if held[b] != self._references[b])
            have, want = self._references[block], held[block]
            raise EngineError(f"cache block {block} counts {have} references, and {want} tables hold it")
        in_use = [block for block, references in enumerate(held) if references]
        if sorted([*self._blank, *self._cached, *in_use]) != list(range(self.num_blocks)):
            raise EngineError("a cache block is lost, or in two roles at once")
        if {key: block for block, (key, _) in self._content.items()} != self._by_key:
            raise EngineError("the prefix index and the blocks' contents disagree")
        findable = self._content.keys()
        if not self._cached.keys() <= findable or not findable.isdisjoint(self._blank):
            raise EngineError("a free cache block stands in the wrong list")
