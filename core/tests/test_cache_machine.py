"""Pool, prefix cache and scheduler against a naive model, under every order of events that Hypothesis can think of.

Keys and values stand for the whole history that they depend on: salt and all tokens so far, interned as a number. Each
step writes these into a memory, slot by slot, as the block tables say; the invariants read them back. What the
pool may hand out, and what a prefix must find, is predicted by `NaivePool` from four lists and a dictionary.

Set MACHINE_EXAMPLES for a longer run (each example is up to 100 steps).
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bestiary.cache import BlockPool, BlockTable, CacheGroup, PagedCache
from bestiary.cache.tables import root_key
from bestiary.scheduler import Scheduled, Scheduler
from bestiary.scheduler import Sequence as Tokens

EXAMPLES = int(os.environ.get("MACHINE_EXAMPLES", "750"))
STEPS = 100
SALTS = ("", "tenant")
GARBAGE = -1


@dataclass
class Histories:
    """A number for each (salt, tokens so far): equal numbers, equal histories."""

    known: dict[tuple[int | str, int], int] = field(default_factory=dict)
    parents: list[int | str] = field(default_factory=list)

    def of(self, salt: str, tokens: Iterable[int]) -> list[int]:
        parent: int | str = salt
        found = []
        for token in tokens:
            before = parent
            parent = self.known.setdefault((before, token), len(self.known))
            if parent == len(self.parents):
                self.parents.append(before)
            found.append(parent)
        return found

    def ending(self, end: int, n: int) -> list[int | str]:
        """The last `n` on the way to `end`."""
        found: list[int | str] = [end]
        while len(found) < n:
            found.insert(0, self.parents[int(found[0])])
        return found


@dataclass
class NaivePool:
    """What the pool must be like, slowly."""

    holders: list[int]
    blank: set[int]
    #: Free blocks that can be found, by the time at which the last holder let go.
    cached: list[int] = field(default_factory=list)
    #: History at the block's end -> block.
    findable: dict[int, int] = field(default_factory=dict)

    def forget(self, block: int) -> None:
        self.findable = {history: b for history, b in self.findable.items() if b != block}


class WatchedPool(BlockPool):
    """The real pool; each answer is compared with the naive one's. `failures` allocations from now fails on purpose."""

    def __init__(self, num_blocks: int, block_size: int, happened: Counter[str]) -> None:
        super().__init__(num_blocks, block_size)
        self.naive = NaivePool([0] * num_blocks, set(range(num_blocks)))
        self.fail_in = 0
        self.has_failed = False
        self.happened = happened

    def take(self, n: int) -> list[int] | None:
        self.fail_in -= 1
        if self.fail_in == 0:
            self.has_failed = True
            return None
        naive = self.naive
        taken = super().take(n)
        if n > len(naive.blank) + len(naive.cached):
            assert taken is None
            return None
        assert taken is not None and len(set(taken)) == n
        assert all(naive.holders[block] == 0 for block in taken), "a block in use was handed out"
        from_blank = taken[: len(naive.blank)]
        assert set(from_blank) <= naive.blank, "a cached block was evicted while a blank one was free"
        evicted = taken[len(from_blank) :]
        assert evicted == naive.cached[: len(evicted)], "not the least recently used block was evicted"
        self.happened["evictions"] += len(evicted)
        naive.blank -= set(from_blank)
        naive.cached = naive.cached[len(evicted) :]
        for block in taken:
            naive.holders[block] = 1
            naive.forget(block)
        return taken

    def hold(self, block: int) -> None:
        super().hold(block)
        if self.naive.holders[block] == 0:
            self.naive.cached.remove(block)
        else:
            self.happened["blocks shared while in use"] += 1
        self.naive.holders[block] += 1

    def drop(self, blocks: Iterable[int]) -> None:
        blocks = list(blocks)
        super().drop(blocks)
        naive = self.naive
        for block in blocks:
            naive.holders[block] -= 1
            if naive.holders[block] == 0:
                if block in naive.findable.values():
                    naive.cached.append(block)
                else:
                    naive.blank.add(block)

    def clear(self) -> None:
        super().clear()
        self.naive.blank |= set(self.naive.cached)
        self.naive.cached.clear()
        self.naive.findable.clear()


class WatchedCache(PagedCache):
    """The real cache; each prefix that it finds must be the longest there is, and be this prompt's."""

    def __init__(self, pool: WatchedPool, *, share_prefixes: bool) -> None:
        super().__init__([CacheGroup(pool.num_blocks)], pool.block_size, share_prefixes=share_prefixes)
        self.shares = share_prefixes
        self.pool = self.watched = pool
        self.pools = [pool]
        self.histories = Histories()
        self.salts: dict[bytes, str] = {root_key(salt): salt for salt in SALTS}
        self.memory = [[GARBAGE] * pool.block_size for _ in range(pool.num_blocks)]

    def history(self, table: BlockTable, tokens: Sequence[int]) -> list[int]:
        return self.histories.of(self.salts[table.root], tokens)

    def match(self, table: BlockTable, tokens: Sequence[int]) -> int:
        size = self.pool.block_size
        history = self.history(table, tokens)
        expected = []
        ends = range(size, len(tokens), size) if self.shares else ()  # the last token is never taken from the cache
        for end in ends:
            block = self.watched.naive.findable.get(history[end - 1])
            if block is None:
                break
            expected.append(block)
        found = super().match(table, tokens)
        assert list(table.of(0)) == expected and found == size * len(expected)
        for index, block in enumerate(table.of(0)):
            assert self.memory[block] == history[index * size : (index + 1) * size], "a prefix of somebody else"
        self.watched.happened["hits"] += found > 0
        return found


@dataclass
class Alive:
    """A sequence and whose it is."""

    sequence: Tokens
    salt: str


class CacheMachine(RuleBasedStateMachine):
    """Admission, growth, forks, hits, ends, preemption and failures, in any order."""

    #: What happened in all examples together, so that the test can tell whether it tried everything.
    happened: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[Alive] = []
        self.gone: list[Alive] = []
        self.arrivals = 0

    @initialize(
        num_blocks=st.sampled_from((9, 24, 14, 6, 4, 2, 1)),
        block_size=st.sampled_from((2, 1, 3, 4)),
        max_num_seqs=st.sampled_from((4, 3, 8, 2, 1)),
        budget=st.sampled_from((8, 64, 16, 5, 3, 2, 1)),
        share=st.sampled_from((True, True, True, True, False)),
    )
    def start(self, num_blocks: int, block_size: int, max_num_seqs: int, budget: int, share: bool) -> None:
        self.pool = WatchedPool(num_blocks, block_size, self.happened)
        self.cache = WatchedCache(self.pool, share_prefixes=share)
        self.capacity = num_blocks * block_size
        self.scheduler = Scheduler(self.cache, max_num_seqs, budget)

    # ---- what can happen --------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.alive) < 8)
    @rule(
        pattern=st.sampled_from(([0], [1], [0, 0, 1])),
        length=st.integers(1, 14),
        tail=st.lists(st.integers(0, 1), max_size=2),
        salt=st.sampled_from((*SALTS, SALTS[0])),
        reads=st.integers(0, 7),
    )
    def admit(self, pattern: list[int], length: int, tail: list[int], salt: str, reads: int) -> None:
        """So few different prompts that most have met somebody's prefix before."""
        self._add((pattern * length)[:length] + tail, salt, reads_prompt=reads == 7)

    @precondition(lambda self: 0 < len(self.alive) < 8)
    @rule(data=st.data(), other_salt=st.booleans(), keep=st.integers(0, 3))
    def fork(self, data: st.DataObject, other_salt: bool, keep: int) -> None:
        """The same beginning as another one that still runs, for the same tenant or for the other."""
        parent = data.draw(st.sampled_from(self.alive))
        tokens = parent.sequence.tokens[: len(parent.sequence.tokens) - keep] or [0]
        self._add(tokens, SALTS[parent.salt == ""] if other_salt else parent.salt)

    @precondition(lambda self: self.gone and len(self.alive) < 8)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), max_size=3))
    def hit(self, data: st.DataObject, more: list[int]) -> None:
        """The next turn of a conversation whose last one has ended."""
        before = data.draw(st.sampled_from(self.gone))
        self._add(before.sequence.tokens + more, before.salt)

    @precondition(lambda self: self.alive)
    @rule(tokens=st.lists(st.integers(0, 1), min_size=4, max_size=4), times=st.integers(1, 8))
    def step(self, tokens: list[int], times: int) -> None:
        """Steps that end well: what was planned is written, and who reached the end of its tokens gets one more."""
        for _ in range(times):
            plan = self._schedule()
            self._write(plan)
            self._commit(plan)
            self._grow(plan, tokens)

    @precondition(lambda self: self.alive)
    @rule(is_written=st.booleans())
    def step_that_fails(self, is_written: bool) -> None:
        """Nothing is committed, though anything may stand in the slots by then."""
        plan = self._schedule()
        if is_written:
            self._write(plan, garbage=True)

    @precondition(lambda self: self.alive)
    @rule(culprit=st.integers(0, 3), tokens=st.lists(st.integers(0, 1), min_size=4, max_size=4))
    def step_in_which_one_fails(self, culprit: int, tokens: list[int]) -> None:
        """The others go on; the culprit is removed."""
        plan = self._schedule()
        if not plan:
            return
        failed = plan[culprit % len(plan)]
        self._write([failed], garbage=True)
        well = [entry for entry in plan if entry is not failed]
        self._write(well)
        self._commit(well)
        self._remove(failed.sequence)
        self._grow(well, tokens)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def finish_or_abort(self, data: st.DataObject) -> None:
        """Waiting or running, in the middle of a prompt or of an answer."""
        self._remove(data.draw(st.sampled_from(self.alive)).sequence)

    @rule(trouble=st.sampled_from(("allocation", "allocation", "wrong", "clear")), n=st.integers(1, 4))
    def trouble(self, trouble: str, n: int) -> None:
        """An allocation will fail; or a sequence's blocks turn out to be wrong; or nothing must be found any more."""
        if trouble == "allocation":
            self.pool.fail_in = n
        elif trouble == "clear":
            self.pool.clear()
        elif self.alive:
            table = self.alive[n % len(self.alive)].sequence.table
            self.cache.forget(table)
            for block in table.of(0):
                self.pool.naive.forget(block)

    # ---- what must hold after each ----------------------------------------------------------------------------------

    @invariant()
    def counts_add_up(self) -> None:
        """Free + used = all; as many references as holders; every block in one role."""
        self.happened["steps"] += 1
        pool, naive = self.pool, self.pool.naive
        held = [block for one in self.alive for block in one.sequence.table.of(0)]
        assert [held.count(block) for block in range(pool.num_blocks)] == naive.holders
        assert pool.num_free == pool.num_blocks - len(set(held))
        assert pool.num_cached == len(naive.cached)
        assert naive.blank.isdisjoint(naive.cached) and not {*naive.blank, *naive.cached} & set(held)
        pool.check_integrity(one.sequence.table.of(0) for one in self.alive)

    @invariant()
    def tables_are_as_long_as_their_tokens(self) -> None:
        size = self.pool.block_size
        for one in self.alive:
            sequence = one.sequence
            blocks = len(sequence.table.of(0))
            if sequence in self.scheduler.waiting:
                assert blocks == 0 and sequence.num_computed == 0
            else:
                assert -(-sequence.num_computed // size) <= blocks <= -(-len(sequence.tokens) // size)

    @invariant()
    def caches_hold_their_owners_tokens(self) -> None:
        """What each sequence would read is its own history, and what can be found is what its key was made from."""
        size = self.pool.block_size
        for one in self.alive:
            sequence = one.sequence
            history = self.cache.history(sequence.table, sequence.tokens[: sequence.num_computed])
            stored = [slot for block in sequence.table.of(0) for slot in self.cache.memory[block]]
            assert stored[: len(history)] == history
        for end, block in self.pool.naive.findable.items():
            assert self.cache.memory[block] == self.cache.histories.ending(end, size), "a findable block was changed"

    @invariant()
    def seats_and_order_are_kept(self) -> None:
        scheduler = self.scheduler
        assert len(scheduler.running) <= scheduler.max_num_seqs
        order = [int(sequence.id) for sequence in scheduler]
        assert order == sorted(order) and len(order) == len(self.alive) == len(scheduler)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for one in list(self.alive):
                self._remove(one.sequence)
            assert self.pool.num_free == self.pool.num_blocks
            self.pool.check_integrity([])

    # ---- how ---------------------------------------------------------------------------------------------------------

    def _add(self, tokens: list[int], salt: str, *, reads_prompt: bool = False) -> None:
        tokens = tokens[: self.capacity]
        sequence = Tokens(str(self.arrivals), list(tokens), BlockTable(root_key(salt)), reads_prompt=reads_prompt)
        self.arrivals += 1
        self.alive.append(Alive(sequence, salt))
        self.scheduler.add(sequence)

    def _remove(self, sequence: Tokens) -> None:
        self.scheduler.remove(sequence)
        assert sequence.table.blocks == []
        self.gone = [*self.gone[-3:], *(one for one in self.alive if one.sequence is sequence)]
        self.alive = [one for one in self.alive if one.sequence is not sequence]

    def _schedule(self) -> list[Scheduled]:
        self.pool.has_failed = False
        decodes = [s for s in self.scheduler.running if s.num_pending == 1]
        before = {id(s): s.num_computed for s in self.scheduler.running}
        plan = self.scheduler.schedule()
        preempted = [s for s in self.scheduler.waiting if id(s) in before]
        assert all(s.num_computed == 0 and not s.table.of(0) for s in preempted)
        self.happened["preemptions"] += len(preempted)
        self.happened["failed allocations"] += self.pool.has_failed
        self.happened["prefill beside decode"] += len({entry.count > 1 for entry in plan}) == 2
        assert sum(entry.count for entry in plan) <= self.scheduler.max_num_batched_tokens
        assert len({id(entry.sequence) for entry in plan}) == len(plan)
        planned = {id(entry.sequence): entry for entry in plan}
        for entry in plan:
            sequence = entry.sequence
            assert sequence in self.scheduler.running and entry.count > 0 and entry.start == sequence.num_computed
            assert len(sequence.table.of(0)) == -(-(entry.start + entry.count) // self.pool.block_size)
            assert entry.samples == (entry.start + entry.count == len(sequence.tokens))
            if id(sequence) not in before and sequence.reads_prompt:
                assert entry.start == 0
        if not self.pool.has_failed and self.alive:
            assert id(next(iter(self.scheduler))) in planned, "the oldest was passed over"
        if len(decodes) <= self.scheduler.max_num_batched_tokens:
            still = [s for s in decodes if s in self.scheduler.running]
            assert all(id(s) in planned for s in still), "a prompt delayed somebody's next token"
        return plan

    def _write(self, plan: Iterable[Scheduled], garbage: bool = False) -> None:
        size, findable = self.pool.block_size, set(self.pool.naive.findable.values())
        for entry in plan:
            sequence = entry.sequence
            end = entry.start + entry.count
            history = self.cache.history(sequence.table, sequence.tokens[:end])
            for position in range(entry.start, end):
                block = sequence.table.of(0)[position // size]
                assert block not in findable and self.pool.naive.holders[block] == 1, "a shared block was written to"
                self.cache.memory[block][position % size] = GARBAGE if garbage else history[position]

    def _commit(self, plan: list[Scheduled]) -> None:
        """The first to fill a block with some history gives it its name, in the order of the plan."""
        size, findable = self.pool.block_size, self.pool.naive.findable
        for entry in plan if self.cache.shares else ():
            sequence = entry.sequence
            history = self.cache.history(sequence.table, sequence.tokens)
            for index in range(entry.start // size, (entry.start + entry.count) // size):
                findable.setdefault(history[(index + 1) * size - 1], sequence.table.of(0)[index])
        self.scheduler.commit(plan)

    def _grow(self, plan: list[Scheduled], tokens: list[int]) -> None:
        """Append a token to each that was sampled; who has no room for it is finished."""
        for number, entry in enumerate(plan):
            if entry.samples:
                sequence = entry.sequence
                if len(sequence.tokens) == self.capacity:
                    self._remove(sequence)
                else:
                    sequence.tokens.append(tokens[number % len(tokens)])


def test_no_order_of_events_breaks_pool_cache_and_scheduler() -> None:
    """R1 of the quality goals: at least 50,000 steps, and none of the interesting events left out."""
    happened = CacheMachine.happened
    happened.clear()
    run_state_machine_as_test(
        CacheMachine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize="MACHINE_EXAMPLES" not in os.environ,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(dict(happened))
    assert happened["steps"] >= 67 * EXAMPLES
    for event in (
        "hits",
        "evictions",
        "preemptions",
        "failed allocations",
        "prefill beside decode",
        "blocks shared while in use",
    ):
        assert happened[event] >= EXAMPLES // 2, event
