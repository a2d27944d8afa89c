"""Who has which slot: adapters by name, what is in use, and what goes first. Knows no tensor and no file's content.

An adapter that somebody runs with is pinned to its slot. A name may be given to other content, or taken away, at any
time: who runs with the old content keeps it to the end.
"""

import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bestiary.errors import EngineError, RequestError

__all__ = ["Book", "Entry"]

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(eq=False)
class Entry:
    """One adapter's content under a name."""

    name: str
    folder: Path
    #: How executors call it; no two contents ever share one.
    key: str
    digest: bytes
    slot: int | None = None
    #: Sequences that run with it, and requests that will.
    running: int = 0
    requests: int = 0
    #: Why it could not be put into its slot; its sequences end as soon as their steps are back.
    trouble: str = ""


class Book:
    """The adapters that are known, `slots` of which can be in a batch, and at most `held` in memory."""

    def __init__(self, slots: int, held: int) -> None:
        self._named: dict[str, Entry] = {}
        self._slots: list[Entry | None] = [None] * slots
        #: Whose matrices are in memory, the one used longest ago first.
        self._held: OrderedDict[Entry, None] = OrderedDict()
        self._most_held = held
        self._moves: list[tuple[int, Entry]] = []
        self._numbers = 0

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._named.values())

    def new_key(self, name: str) -> str:
        """What content that is about to be read is called. Raises RequestError for a name that cannot be one."""
        if not isinstance(name, str) or not _NAME.fullmatch(name) or not name.strip("."):
            raise RequestError(f"lora {name!r}: a name has 1 to 64 letters, digits, dots, dashes and underscores")
        self._numbers += 1
        return f"{name}#{self._numbers}"

    def find(self, name: str) -> Entry:
        """The content that a name stands for now. Raises RequestError where it stands for none."""
        if (found := self._named.get(name)) is None:
            known = ", ".join(sorted(self._named)) or "none"
            raise RequestError(f"there is no adapter {name!r}; loaded are: {known}")
        return found

    def enter(self, entry: Entry) -> None:
        """Let a name stand for this content, which is in memory, from now on."""
        self._named[entry.name] = entry
        self._held[entry] = None

    def remove(self, name: str) -> Entry:
        """Take a name away. Who runs with it keeps its content."""
        entry = self.find(name)
        del self._named[name]
        return entry

    def hold(self, entry: Entry) -> bool:
        """Somebody is about to run with it: False while every slot is taken by others that run."""
        if entry.slot is None and not self._seat(entry):
            return False
        if entry in self._held:
            self._held.move_to_end(entry)
        entry.running += 1
        return True

    def drop(self, entry: Entry) -> None:
        """Somebody does not run with it any more."""
        if entry.running < 1:
            raise EngineError(f"adapter {entry.name!r} was given back more often than it was taken")
        entry.running -= 1

    def _seat(self, entry: Entry) -> bool:
        """Take a free slot, or that of who was used longest ago and does not run."""
        free = [slot for slot, holder in enumerate(self._slots) if holder is None]
        if not free:
            order = {holder: place for place, holder in enumerate(self._held)}
            idle = [holder for holder in self._slots if holder is not None and not holder.running]
            if not idle:
                return False
            leaving = min(idle, key=lambda holder: order.get(holder, -1))
            assert leaving.slot is not None
            free, leaving.slot = [leaving.slot], None
        entry.slot, entry.trouble = free[0], ""
        self._slots[entry.slot] = entry
        self._moves.append((entry.slot, entry))
        return True

    def moves(self) -> Iterator[tuple[int, Entry]]:
        """Slots that must be filled before the next step, in order; what an interruption cuts short is asked anew."""
        while self._moves:
            yield self._moves[0]
            self._moves.pop(0)

    def unseat(self, entry: Entry, trouble: str = "") -> None:
        """It needs its slot no more, or this could not be filled."""
        entry.trouble = trouble
        if entry.slot is not None:
            self._slots[entry.slot], entry.slot = None, None

    def is_held(self, entry: Entry) -> bool:
        """Its matrices are in memory."""
        return entry in self._held

    def held(self, entry: Entry) -> None:
        """Its matrices were read again."""
        self._held[entry] = None

    def surplus(self) -> list[Entry]:
        """Whose matrices may leave memory now, since nobody will ask for them, or there are too many; asked once."""
        useless = [e for e in self._held if self._named.get(e.name) is not e and not e.requests]
        for entry in useless:
            self.unseat(entry)
            del self._held[entry]
        extra = [e for e in self._held if e.slot is None][: max(0, len(self._held) - self._most_held)]
        for entry in extra:
            del self._held[entry]
        return useless + extra

    def clear_slots(self) -> None:
        """The executor is a new one: nothing is in it."""
        for entry in [*self._named.values(), *self._held]:
            entry.slot, entry.running = None, 0
        self._slots = [None] * len(self._slots)
        self._held.clear()
        self._moves.clear()

    def check_integrity(self, running: list[Entry]) -> None:
        """Raise EngineError unless slots and counts are those of who runs."""
        for slot, holder in enumerate(self._slots):
            if holder is not None and holder.slot != slot:
                raise EngineError(f"slot {slot} is {holder.name!r}'s, which has slot {holder.slot}")
        known = {*self._named.values(), *self._held, *running}
        for entry in known:
            if entry.running != running.count(entry):
                raise EngineError(
                    f"adapter {entry.name!r} counts {entry.running} users, and has {running.count(entry)}"
                )
            seated = entry.slot is not None and self._slots[entry.slot] is entry
            if entry.running and not seated and not entry.trouble:
                raise EngineError(f"adapter {entry.name!r} is in use and has no slot")
