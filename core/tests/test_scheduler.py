"""What the scheduler does in situations that one can draw on paper. Every order of events: test_cache_machine.py."""

from collections.abc import Callable, Iterable, Sequence

import pytest

from bestiary.cache import BlockPool, BlockTable, CacheGroup, PagedCache
from bestiary.cache.tables import root_key
from bestiary.errors import EngineError
from bestiary.scheduler import Scheduled, Scheduler
from bestiary.scheduler import Sequence as Tokens


def scheduler(
    blocks: int = 100, block_size: int = 4, seats: int = 8, budget: int = 16, share: bool = True
) -> Scheduler:
    return Scheduler(PagedCache([CacheGroup(blocks)], block_size, share_prefixes=share), seats, budget)


def sequence(name: str, tokens: Sequence[int], salt: str = "", reads_prompt: bool = False) -> Tokens:
    return Tokens(name, list(tokens), BlockTable(root_key(salt)), reads_prompt=reads_prompt)


def run(on: Scheduler) -> list[tuple[str, int, int]]:
    """One step that ends well; whoever was sampled gets the token 7. Returns (name, start, count) in order."""
    plan = on.schedule()
    on.commit(plan)
    for entry in plan:
        if entry.samples:
            entry.sequence.tokens.append(7)
    return shape(plan)


def shape(plan: list[Scheduled]) -> list[tuple[str, int, int]]:
    return [(entry.sequence.id, entry.start, entry.count) for entry in plan]


def take(pool: BlockPool, n: int) -> list[int]:
    taken = pool.take(n)
    assert taken is not None
    return taken


def names(sequences: Iterable[Tokens]) -> str:
    return "".join(s.id for s in sequences)


# ---- order, budget and chunks ----------------------------------------------------------------------------------------


def test_first_come_first_served() -> None:
    on = scheduler(seats=2)
    for name in "ABC":
        on.add(sequence(name, [1, 2]))
    assert run(on) == [("A", 0, 2), ("B", 0, 2)]
    assert names(on.running) == "AB" and names(on.waiting) == "C" and names(on) == "ABC" and len(on) == 3
    on.remove(on.running[0])
    assert run(on) == [("B", 2, 1), ("C", 0, 2)]


def test_a_long_prompt_is_computed_in_chunks_and_sampled_after_the_last() -> None:
    on = scheduler(budget=5)
    on.add(sequence("A", range(12)))
    plan = on.schedule()
    assert shape(plan) == [("A", 0, 5)] and not plan[0].samples
    on.commit(plan)
    assert run(on) == [("A", 5, 5)]
    plan = on.schedule()
    assert shape(plan) == [("A", 10, 2)] and plan[0].samples


def test_chunks_of_a_prompt_run_beside_decodes_in_one_step() -> None:
    on = scheduler(budget=6)
    on.add(sequence("A", [1, 2]))
    run(on)
    on.add(sequence("B", range(10)))
    assert run(on) == [("A", 2, 1), ("B", 0, 5)]
    assert run(on) == [("A", 3, 1), ("B", 5, 5)]
    assert run(on) == [("A", 4, 1), ("B", 10, 1)]


def test_a_long_prompt_delays_nobodys_next_token() -> None:
    """Though the prompt is the oldest and could use up every step alone."""
    on = scheduler(budget=8)
    on.add(sequence("A", range(7)))
    on.add(sequence("B", [1]))
    plan = on.schedule()
    assert shape(plan) == [("A", 0, 7), ("B", 0, 1)]
    on.commit(plan[1:])  # A's row came to nothing: it is still in its prompt
    on.running[1].tokens.append(7)
    assert shape(on.schedule()) == [("B", 1, 1), ("A", 0, 7)]


def test_the_budget_goes_to_the_oldest_where_it_is_smaller_than_the_decodes() -> None:
    on = scheduler(budget=4)
    for name in "ABCD":
        on.add(sequence(name, [1]))
    run(on)
    on.max_num_batched_tokens = 2
    assert run(on) == [("A", 1, 1), ("B", 1, 1)]
    assert run(on) == [("A", 2, 1), ("B", 2, 1)]


def test_nothing_to_do_is_an_empty_step() -> None:
    on = scheduler()
    assert on.schedule() == [] and len(on) == 0 and list(on) == []


def test_a_step_that_was_not_committed_is_planned_again() -> None:
    on = scheduler()
    on.add(sequence("A", range(6)))
    assert shape(on.schedule()) == shape(on.schedule()) == [("A", 0, 6)]


# ---- admission -------------------------------------------------------------------------------------------------------


def test_admission_leaves_each_of_the_running_a_block_to_grow_into() -> None:
    on = scheduler(blocks=4, block_size=4)
    on.add(sequence("A", range(8)))
    on.add(sequence("B", [1]))
    assert run(on) == [("A", 0, 8), ("B", 0, 1)]  # one block is left for A, and B's is not full
    on = scheduler(blocks=3, block_size=4)
    on.add(sequence("A", range(8)))
    on.add(sequence("B", [1]))
    assert run(on) == [("A", 0, 8)]  # the last block is A's to grow into
    assert run(on) == [("A", 8, 1)] and names(on.waiting) == "B"


def test_a_newcomer_that_does_not_fit_keeps_its_place_and_holds_nothing() -> None:
    on = scheduler(blocks=4, block_size=4)
    on.add(sequence("A", range(8)))
    run(on)
    on.add(sequence("B", [*range(8), 1, 1, 1, 1, 1]))
    on.add(sequence("C", [1]))
    assert run(on) == [("A", 8, 1)]
    assert names(on.waiting) == "BC" and on.waiting[0].table.blocks == []
    on.cache.pools[0].check_integrity([on.running[0].table.of(0)])


def test_a_prompt_that_was_seen_before_starts_behind_its_cached_blocks() -> None:
    on = scheduler()
    on.add(first := sequence("A", range(10)))
    run(on)
    blocks = list(first.table.of(0))
    on.add(sequence("B", range(10)))
    assert run(on) == [("A", 10, 1), ("B", 8, 2)]
    second = on.running[1]
    assert second.num_cached == 8 and second.table.of(0)[:2] == blocks[:2] and second.table.of(0)[2] != blocks[2]


def test_the_last_token_of_a_prompt_is_never_taken_from_the_cache() -> None:
    on = scheduler()
    on.add(sequence("A", range(8)))
    run(on)
    on.add(sequence("B", range(8)))
    assert run(on)[1] == ("B", 4, 4)


def test_blocks_of_a_step_that_failed_are_not_found() -> None:
    on = scheduler()
    on.add(failed := sequence("A", range(8)))
    on.schedule()
    on.remove(failed)
    on.add(sequence("B", range(9)))
    assert run(on) == [("B", 0, 9)]


@pytest.mark.parametrize("salts", [("", "x"), ("x", "y"), ("root", "")])
def test_tenants_with_different_salts_share_nothing(salts: tuple[str, str]) -> None:
    on = scheduler()
    on.add(sequence("A", range(9), salts[0]))
    run(on)
    on.add(sequence("B", range(9), salts[1]))
    on.add(sequence("C", range(9), salts[0]))
    assert run(on) == [("A", 9, 1), ("B", 0, 9), ("C", 8, 1)]


def test_without_prefix_caching_nothing_is_found() -> None:
    on = scheduler(share=False)
    on.add(sequence("A", range(9)))
    run(on)
    on.add(sequence("B", range(9)))
    assert run(on)[1] == ("B", 0, 9)
    assert on.cache.pools[0].num_cached == 0


def test_who_reads_its_prompt_computes_all_of_it_and_others_find_it() -> None:
    on = scheduler(budget=32)
    on.add(sequence("A", range(9)))
    run(on)
    on.add(sequence("B", range(9), reads_prompt=True))
    on.add(sequence("C", range(9)))
    assert run(on) == [("A", 9, 1), ("B", 0, 9), ("C", 8, 1)]
    assert on.running[1].num_cached == 0


def test_who_reads_its_prompt_again_after_yielding_lets_others_find_it_again() -> None:
    on = scheduler()
    on.add(one := sequence("A", range(9), reads_prompt=True))
    run(on)
    on.preempt(one)
    on.cache.pools[0].clear()
    assert run(on) == [("A", 0, 10)]
    on.add(sequence("B", range(9)))
    assert run(on)[1] == ("B", 8, 1)


def test_who_found_blocks_that_were_forgotten_since_does_not_name_them_again() -> None:
    on = scheduler()
    on.add(wrong := sequence("A", range(9)))
    run(on)
    on.add(sequence("B", range(9)))
    run(on)
    on.cache.forget(wrong.table)
    for _ in range(4):
        run(on)
    on.add(sequence("C", range(9)))
    assert run(on)[2] == ("C", 0, 9)


def test_blocks_that_were_forgotten_are_not_found_and_stay_with_their_holder() -> None:
    on = scheduler()
    on.add(wrong := sequence("A", range(9)))
    run(on)
    on.cache.forget(wrong.table)
    on.add(sequence("B", range(9)))
    assert run(on) == [("A", 9, 1), ("B", 0, 9)]
    on.cache.pools[0].check_integrity(s.table.of(0) for s in on)


# ---- preemption ------------------------------------------------------------------------------------------------------


def grown_full() -> Scheduler:
    """A and B fill five of six blocks; at the next step but one, A takes the last, and then B needs one more."""
    on = scheduler(blocks=6, block_size=2, budget=16)
    on.add(sequence("A", [1, 2, 3, 4]))
    on.add(sequence("B", [5, 6]))
    assert run(on) == [("A", 0, 4), ("B", 0, 2)]
    assert run(on) == [("A", 4, 1), ("B", 2, 1)]
    assert run(on) == [("A", 5, 1), ("B", 3, 1)]
    return on


def test_the_youngest_yields_its_blocks_and_waits_at_the_front() -> None:
    on = grown_full()
    on.add(sequence("C", [9]))
    assert run(on) == [("A", 6, 1)]
    assert names(on.running) == "A" and names(on.waiting) == "BC"
    yielded = on.waiting[0]
    assert yielded.num_preemptions == 1 and yielded.num_computed == 0 and yielded.table.blocks == []
    assert yielded.tokens == [5, 6, 7, 7, 7]


def test_a_resumed_sequence_finds_its_own_blocks_again() -> None:
    """It computes one token, as it would have without the preemption: nobody took its free blocks meanwhile."""
    on = grown_full()
    run(on)
    on.remove(on.running[0])
    assert run(on) == [("B", 4, 1)]
    assert on.running[0].num_cached == 0  # what it finds of its own is no hit


def test_a_resumed_sequence_computes_again_what_was_evicted() -> None:
    on = grown_full()
    run(on)
    on.cache.pools[0].clear()
    on.remove(on.running[0])
    assert run(on) == [("B", 0, 5)]


def test_nobody_is_admitted_in_a_step_that_preempts() -> None:
    on = scheduler(blocks=6, block_size=2, seats=3)
    on.add(sequence("A", [1, 2, 3, 4]))
    on.add(sequence("B", [5, 6]))
    run(on)
    on.add(sequence("C", [9]))
    for _ in range(2):
        run(on)
    assert run(on) == [("A", 6, 1)] and names(on.waiting) == "BC"


def test_a_decode_that_was_planned_loses_its_place_when_an_older_prompt_needs_its_blocks() -> None:
    """Decodes are planned before prompts, so the one that yields may stand in the plan already."""
    on = scheduler(blocks=4, block_size=2, budget=8)
    on.add(prompt := sequence("A", [1, 2]))
    on.add(sequence("B", [5, 6]))
    run(on)
    prompt.tokens.extend([1, 1, 1])  # a step gave more than one token: A has four to compute, and B one
    prompt.num_computed = 2
    assert shape(on.schedule()) == [("A", 2, 4)]
    assert names(on.waiting) == "B"
    on.cache.pools[0].check_integrity(s.table.of(0) for s in on)


def test_who_yielded_before_its_turn_is_passed_over() -> None:
    on = scheduler(blocks=6, block_size=1)
    for name in "ABC":
        on.add(sequence(name, [1]))
    assert run(on) == [("A", 0, 1), ("B", 0, 1), ("C", 0, 1)]
    assert run(on) == [("A", 1, 1), ("B", 1, 1), ("C", 1, 1)]
    assert run(on) == [("A", 2, 1), ("B", 2, 1)]  # A took what C gave up, and there was enough of it for B too
    assert names(on.waiting) == "C"


def test_an_allocation_that_fails_though_blocks_are_free_costs_a_step_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on = scheduler(block_size=1)
    on.add(sequence("A", [1, 2]))
    run(on)
    with monkeypatch.context() as patch:
        patch.setattr(on.cache.pools[0], "take", lambda n: None)
        assert on.schedule() == []
        assert names(on.waiting) == "A"
        assert on.schedule() == []
    assert run(on) == [("A", 2, 1)]


def test_removal_gives_all_blocks_back_at_every_stage() -> None:
    on = scheduler(blocks=6, block_size=2, budget=3)
    waiting, running = sequence("A", range(8)), sequence("B", [1])
    on.add(waiting)
    on.add(running)
    on.remove(waiting)  # before it ever ran
    run(on)
    on.remove(running)
    on.add(half := sequence("C", range(8)))
    run(on)
    on.remove(half)  # in the middle of its prompt
    assert len(on) == 0 and on.cache.pools[0].num_free == 6
    on.cache.pools[0].check_integrity([])


# ---- the pool's own guards -------------------------------------------------------------------------------------------


def test_a_block_given_back_twice_is_an_error() -> None:
    pool = BlockPool(2, 4)
    taken = take(pool, 1)
    pool.drop(taken)
    with pytest.raises(EngineError, match=f"block {taken[0]} was given back more often"):
        pool.drop(taken)


def test_equal_keys_do_not_stand_for_equal_tokens() -> None:
    """A digest that collides finds nothing: the tokens are compared."""
    pool = BlockPool(2, 2)
    (block,) = take(pool, 1)
    pool.publish(block, b"key", [1, 2])
    assert pool.find(b"key", [1, 2]) == block
    assert pool.find(b"key", [1, 3]) is None
    assert pool.find(b"other", [1, 2]) is None


def test_the_first_block_with_some_content_keeps_its_name() -> None:
    pool = BlockPool(2, 1)
    first, second = take(pool, 2)
    pool.publish(first, b"key", [1])
    pool.publish(second, b"key", [1])
    assert pool.find(b"key", [1]) == first
    pool.drop([second, first])
    assert pool.num_cached == 1 and pool.num_free == 2
    pool.check_integrity([])


def test_blank_blocks_are_taken_first_then_the_least_recently_used_and_a_prefix_from_its_tail() -> None:
    on = scheduler(blocks=5, block_size=1, budget=1)
    found = []
    for tokens in ([1, 2], [3]):
        on.add(one := sequence("A", tokens))
        for _ in tokens:
            on.commit(on.schedule())
        found += one.table.of(0)
        on.remove(one)
    head, tail, last = found
    pool = on.cache.pools[0]
    assert pool.num_cached == 3 and pool.num_free == 5
    assert set(take(pool, 2)).isdisjoint(found)
    assert take(pool, 3) == [tail, head, last]
    assert pool.take(1) is None and pool.num_cached == 0


def test_a_sequence_counts_what_was_asked_and_what_was_answered() -> None:
    one = Tokens("A", [1, 2, 3, 4, 5], BlockTable(root_key()), num_prompt=3, num_computed=4)
    assert (one.num_output, one.num_pending) == (2, 1)
    assert sequence("B", [1, 2]).num_prompt == 2


def test_capacity_is_counted_in_tokens() -> None:
    cache = scheduler(blocks=3, block_size=5).cache
    assert cache.longest(chunk=4, limit=100) == 15 and cache.longest(chunk=4, limit=7) == 7
    assert [cache.groups[0].blocks_for(n, 0, 5) for n in (0, 1, 5, 6)] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lambda pool, held, cached: pool._references.__setitem__(held, 2), "counts 2 references, and 1 tables"),
        (lambda pool, held, cached: pool._blank.append(held), "in two roles"),
        (lambda pool, held, cached: pool._blank.append(cached), "in two roles"),
        (lambda pool, held, cached: pool._blank.pop(), "is lost"),
        (lambda pool, held, cached: pool._by_key.clear(), "disagree"),
        (lambda pool, held, cached: (pool._content.clear(), pool._by_key.clear()), "wrong list"),
        (lambda pool, held, cached: pool._blank.append(pool._cached.popitem()[0]), "wrong list"),
    ],
)
def test_the_integrity_check_sees_each_kind_of_damage(
    harm: Callable[[BlockPool, int, int], object], complaint: str
) -> None:
    pool = BlockPool(4, 2)
    held, cached = take(pool, 2)
    pool.publish(cached, b"key", [1, 2])
    pool.drop([cached])
    pool.check_integrity([[held]])
    harm(pool, held, cached)
    with pytest.raises(EngineError, match=complaint):
        pool.check_integrity([[held]])
