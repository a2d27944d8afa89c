"""Slots of adapters under everything that can happen to them, against a model that says what must be true."""

from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bestiary.adapters import Book, Entry
from bestiary.errors import EngineError, RequestError

NAMES = ("a", "b", "c", "d")


class Slots(RuleBasedStateMachine):
    """What an engine does with a book: load, replace, unload, run, end; and an executor with memory and slots."""

    @initialize(slots=st.integers(1, 3), more=st.integers(0, 2))
    def begin(self, slots: int, more: int) -> None:
        self.num_slots, self.most_held = slots, slots + more
        self.book = Book(slots, self.most_held)
        self.named: dict[str, Entry] = {}
        self.requests: list[tuple[Entry, bool]] = []
        #: The executor's: what is in memory, and what was placed in which slot.
        self.memory: set[str] = set()
        self.placed: dict[int, str] = {}

    def tidy(self) -> None:
        for entry in self.book.surplus():
            self.memory.remove(entry.key)

    @rule(name=st.sampled_from(NAMES), content=st.binary(max_size=2))
    def load(self, name: str, content: bytes) -> None:
        key = self.book.new_key(name)
        assert key not in self.memory
        entry = Entry(name, Path(name), key, content)
        self.memory.add(key)
        self.book.enter(entry)
        self.named[name] = entry
        self.tidy()

    @precondition(lambda self: self.named)
    @rule(data=st.data())
    def unload(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.named)))
        assert self.book.remove(name) is self.named.pop(name)
        self.tidy()

    @precondition(lambda self: self.named)
    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.named)))
        entry = self.book.find(name)
        assert entry is self.named[name]
        entry.requests += 1
        self.requests.append((entry, False))

    @precondition(lambda self: any(not runs for _, runs in self.requests))
    @rule(data=st.data(), fails=st.booleans())
    def admit(self, data: st.DataObject, fails: bool) -> None:
        """A waiting request gets its slot, unless all are pinned by others; filling it may fail."""
        number = data.draw(st.sampled_from([i for i, (_, runs) in enumerate(self.requests) if not runs]))
        entry = self.requests[number][0]
        pinned = {other.slot for other, runs in self.requests if runs and other.slot is not None}
        held = self.book.hold(entry)
        assert held == (entry.slot is not None)
        if not held:
            assert len(pinned) == self.num_slots
            return
        self.requests[number] = (entry, True)
        for slot, mover in self.book.moves():
            assert slot not in pinned or mover.slot == slot
            if not self.book.is_held(mover):
                self.memory.add(mover.key)
                self.book.held(mover)
                self.tidy()
            assert mover.key in self.memory
            self.placed[slot] = mover.key
        if fails and entry.running == 1:
            self.book.unseat(entry)
            self.end(number)

    def end(self, number: int) -> None:
        entry, runs = self.requests.pop(number)
        if runs:
            self.book.drop(entry)
        entry.requests -= 1
        self.tidy()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(range(len(self.requests)))))

    @precondition(lambda self: any(runs for _, runs in self.requests))
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from([i for i, (_, runs) in enumerate(self.requests) if runs]))
        entry, _ = self.requests[number]
        self.book.drop(entry)
        self.requests[number] = (entry, False)

    @invariant()
    def who_runs_has_a_slot_of_its_own_with_its_content(self) -> None:
        running = [entry for entry, runs in self.requests if runs]
        self.book.check_integrity(running)
        for entry in running:
            assert entry.slot is not None and self.placed[entry.slot] == entry.key
        seats = {entry.key: entry.slot for entry in running}
        assert len(set(seats.values())) == len(seats) <= self.num_slots

    @invariant()
    def names_stand_for_the_latest_content(self) -> None:
        assert {entry.name: entry for entry in self.book} == self.named

    @invariant()
    def memory_is_given_back(self) -> None:
        wanted = {entry.key for entry in self.named.values()} | {entry.key for entry, _ in self.requests}
        assert self.memory <= wanted
        seated = sum(entry.slot is not None for entry in self.named.values())
        assert len(self.memory) <= max(self.most_held, seated) + len({entry.key for entry, _ in self.requests})


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_what_was_not_taken_cannot_be_given_back() -> None:
    book = Book(1, 1)
    entry = Entry("a", Path("a"), book.new_key("a"), b"")
    book.enter(entry)
    with pytest.raises(EngineError, match="given back more often"):
        book.drop(entry)
    with pytest.raises(RequestError, match="there is no adapter 'b'; loaded are: a"):
        book.find("b")
