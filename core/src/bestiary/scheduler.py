"""Which tokens run next: a token budget, chunked prefill beside decode, first come first served. Knows no model."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import msgspec

from bestiary.adapters import Book, Entry
from bestiary.cache import BlockTable, PagedCache

__all__ = ["Scheduled", "Scheduler", "Sequence"]


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer in the making. `num_prompt` and `num_computed` are stored; the rest follows from the tokens."""

    id: str
    tokens: list[int]
    table: BlockTable
    num_prompt: int = 0
    #: Tokens whose keys and values are in the cache.
    num_computed: int = 0
    #: Tokens that came from another sequence's blocks when this one was first admitted.
    num_cached: int = 0
    #: The prompt's own log-probabilities are wanted: no part of it may come from the cache.
    reads_prompt: bool = False
    #: What it looks at beside its tokens is in the cache.
    has_crossed: bool = False
    num_preemptions: int = 0
    #: What it runs with, where that has a slot to be held while it runs.
    adapter: Entry | None = None
    #: The step of it that is on its way; whatever else comes back is of no use any more.
    flight: "Scheduled | None" = None

    def __post_init__(self) -> None:
        self.num_prompt = self.num_prompt or len(self.tokens)

    @property
    def num_pending(self) -> int:
        """Tokens that must run before the next one can be chosen."""
        return len(self.tokens) - self.num_computed

    @property
    def least(self) -> int:
        """Tokens that the next step must take if it takes any: a prefix that sees itself both ways is not cut."""
        return max(1, self.table.inputs.prefix - self.num_computed)

    @property
    def num_output(self) -> int:
        """Tokens chosen so far."""
        return len(self.tokens) - self.num_prompt


class Scheduled(msgspec.Struct, frozen=True, eq=False, gc=False):
    """`count` tokens of a sequence, from `start` on, run in the next step. Its sequence lets go of it when it lands."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """The step reaches the sequence's last token, so its successor is chosen."""
        return self.start + self.count == len(self.sequence.tokens)


@dataclass
class Scheduler:
    """Waiting and running sequences in order of arrival, over one cache.

    An older sequence never yields to a younger one, and a step always runs the oldest if its blocks can be had: nobody
    starves. Who must yield gives up all blocks, goes to the front of the queue and computes its tokens again, which
    is cheap as far as its full blocks can still be found.
    """

    cache: PagedCache
    max_num_seqs: int
    max_num_batched_tokens: int
    #: The slots of adapters.
    book: Book = field(default_factory=lambda: Book(0, 0))
    #: Sequences shorter than this get room for one token more, where that costs nobody anything.
    early: int = 0
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self.running, self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or aborted, at any moment: a step that is on its way comes before any later one
        that writes to the same blocks.
        """
        sequence.flight = None
        self.cache.release(sequence.table)
        if sequence in self.running:
            self.running.remove(sequence)
            self._drop_slot(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self, most: int | None = None) -> list[Scheduled]:
        """The next step, of at most so many sequences, with blocks reserved for it.

        Empty only when nothing waits or runs, no block can be had, or all that runs is on its way.
        """
        most = self.max_num_seqs if most is None else most
        plan, preempted = self._continue_running(most)
        if not preempted:
            plan += self._admit(self.max_num_batched_tokens - sum(s.count for s in plan), most - len(plan))
        return plan

    def depart(self, plan: list[Scheduled]) -> None:
        """The step is on its way: until it lands, its sequences are left alone."""
        for entry in plan:
            entry.sequence.flight = entry

    def land(self, plan: list[Scheduled]) -> list[bool]:
        """The step is back. Which of its sequences are still as they were when it left: not given up, not preempted."""
        found = [entry.sequence.flight is entry for entry in plan]
        for entry, is_current in zip(plan, found, strict=True):
            if is_current:
                entry.sequence.flight = None
        return found

    def commit(self, plan: list[Scheduled]) -> None:
        """The step ended well: its tokens are in the cache, and full blocks may be found by others."""
        for entry in plan:
            sequence = entry.sequence
            sequence.num_computed = entry.start + entry.count
            sequence.has_crossed = True
            self.cache.commit(sequence.table, sequence.tokens, sequence.num_computed)

    def _continue_running(self, most: int) -> tuple[list[Scheduled], bool]:
        """Chunks for the running, decodes before prefill so that a long prompt delays nobody's next token."""
        plan: list[Scheduled] = []
        budget = self.max_num_batched_tokens
        num_running = len(self.running)
        for sequence in sorted(self.running, key=lambda s: s.num_pending > 1):
            if budget == 0 or len(plan) == most:
                break
            if sequence.flight is not None or (sequence.num_computed == 0 and sequence not in self.running):
                continue  # on its way, or it yielded its blocks a moment ago
            count = min(sequence.num_pending, budget)
            if count >= sequence.least and self._reserve(sequence, count):
                plan.append(Scheduled(sequence, sequence.num_computed, count))
                budget -= count
        still = set(map(id, self.running))
        return [s for s in plan if id(s.sequence) in still], len(self.running) < num_running

    def _reserve(self, sequence: Sequence, count: int) -> bool:
        """Make room, at the cost of those who came later; False when `sequence` itself had to yield."""
        start = sequence.num_computed
        while not self.cache.reserve(sequence.table, start, start + count):
            youngest = self.running[-1]
            if youngest.flight is not None:
                return False  # it yields when it is back
            self.preempt(youngest)
            if youngest is sequence:
                return False
        if start + count < self.early:
            self.cache.reserve(sequence.table, start, start + count + 1, spare=len(self.running))
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Take all blocks of a running sequence back; it waits in front, and its tokens are computed again."""
        self.running.remove(sequence)
        self._drop_slot(sequence)
        self.cache.release(sequence.table)
        sequence.flight = None
        sequence.num_computed, sequence.has_crossed = 0, False
        sequence.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _admit(self, budget: int, most: int) -> list[Scheduled]:
        """First chunks of the waiting, as long as budget, seats and blocks last."""
        plan: list[Scheduled] = []
        while self.waiting and budget > 0 and len(plan) < most and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            found = self._found(sequence)
            count = min(len(sequence.tokens) - found, budget)
            if count < sequence.least - found:
                break
            # Leave each running sequence a block to grow into, or the newcomer would be preempted at once.
            if not self.cache.reserve(sequence.table, found, found + count, spare=len(self.running)):
                self.cache.release(sequence.table)
                break
            if sequence.adapter is not None and not self.book.hold(sequence.adapter):
                self.cache.release(sequence.table)
                break
            sequence.num_computed = found
            if sequence.num_preemptions == 0:
                sequence.num_cached = found
            self.running.append(self.waiting.popleft())
            plan.append(Scheduled(sequence, found, count))
            budget -= count
        return plan

    def _drop_slot(self, sequence: Sequence) -> None:
        if sequence.adapter is not None:
            self.book.drop(sequence.adapter)

    def _found(self, sequence: Sequence) -> int:
        """Tokens of a waiting sequence that somebody else's blocks hold; never a part of what must not be cut."""
        if sequence.reads_prompt:
            return 0
        found = self.cache.match(sequence.table, sequence.tokens)
        if found < sequence.table.inputs.prefix:
            self.cache.release(sequence.table)
            return 0
        return found
