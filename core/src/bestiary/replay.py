"""Decode steps of a few rows, recorded once and replayed with one call each. Knows no request.

With few rows what Python adds between the hundreds of operations of a step would be felt. A step of n rows, one token
each, always runs the same kernels on the same memory; only what lies in its input changes. On a CPU a tape records the
kernels, on a GPU a graph.
"""

from array import array
from collections.abc import Callable, Sequence, Set
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

import bestiary_kernels as kernels
from bestiary.batch import Batch, Crossing, Pages, Slots
from bestiary.blocks import Decoder, Kind, Lanes
from bestiary.sampling.sampler import Choice, Row, sample
from bestiary.step import StepRow
from bestiary_kernels import Arena, Graph, Onward, Tape
from bestiary_kernels.host import HostMemory, bytes_of
from bestiary_kernels.linear import MOST_ROWS

__all__ = ["Found", "Record", "Recording", "Replays"]

#: Rows of the steps that are captured on a GPU. Others get rows that come to nothing, up to the next of these sizes.
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class _Key(NamedTuple):
    """Rows, whether any of them has an adapter, and whether they look at more than tokens, or some of them.

    What stands beside the matrices, and layers that look, are left out where nobody needs them.
    """

    size: int
    adapted: bool
    looking: frozenset[bool]


class Found(NamedTuple):
    """What a step finds for each of its rows, and the token that a sampler would start from."""

    logits_RV: Tensor
    #: See `bestiary_kernels.greedy`.
    best_R: Tensor
    #: Where kernels write to the host's memory, as the host reads it.
    best: memoryview | None

    @classmethod
    def of(cls, logits_RV: Tensor) -> "Found":
        """What these logits say."""
        best_R = kernels.greedy(logits_RV)
        return cls(logits_RV, best_R, None if best_R.is_cuda else bytes_of(best_R).cast("q"))

    def first(self, count: int) -> "Found":
        """What belongs to so many rows."""
        return Found(self.logits_RV[:count], self.best_R[:count], None if self.best is None else self.best[:count])

    def choices(self, rows: Sequence[Row]) -> list[Choice]:
        """A token for each row. Without torch where it can be: of that a step's weights leave nothing in the caches."""
        if self.best is not None and all(row.is_greedy for row in rows):
            return [Choice.of(token) for token in self.best]
        return sample(self.logits_RV, rows, self.best_R)


class Recording(Protocol):
    """A step that can run again over what its input holds by then."""

    def replay(self) -> Found:
        """What the step's function would return."""


#: Runs a function; its result, and a recording where that can be had.
Record = Callable[[Callable[[], Found]], tuple[Found, Recording | None]]


class Replays:
    """A recording for each number of rows, made when it is first needed."""

    def __init__(
        self,
        model: Decoder,
        caches: Sequence[tuple[Tensor, ...]],
        kinds: Sequence[Kind],
        block_size: int,
        longest: int,
        lanes: Lanes,
        device: torch.device,
    ) -> None:
        self._lanes, self._model, self._caches, self._device = lanes, model, caches, device
        self._layout = _Layout(tuple(kinds), block_size, longest)
        self._crosses = any(kind.crossed is not None for kind in kinds)
        self._steps: dict[_Key | None, _Step] = {}
        #: Sizes that are recorded; None: each as it comes, up to the most that a packed product takes.
        self.sizes = None if device.type == "cpu" else _SIZES
        self._record = self._recorder()

    def run(self, rows: Sequence[StepRow], tokens: Tensor | None = None) -> Found | None:
        """What rows of one token each give, valid until the next step; None where there is no recording.

        `tokens` [R] stand for the rows' own where only the device knows those. A model of which some part is not a
        kernel of ours cannot be recorded, and is only tried once.
        """
        key = self._key(rows)
        if key is None:
            return None
        if (step := self._steps.get(key)) is None:
            step = _Step(key, self._layout, self._caches, self._device)
            step.write(rows, tokens)
            self._lanes.set({"tokens": step.adapters, "outputs": step.adapters} if key.adapted else {})
            with torch.inference_mode():
                found, step.recording = self._record(lambda: Found.of(self._model.logits(self._model(step.batch))))
            self._steps[key] = step
        elif step.recording is None:
            return None
        else:
            step.write(rows, tokens)
            found = step.recording.replay()
        return found if len(rows) == key.size else found.first(len(rows))

    def run_on(self, rows: Sequence[StepRow], most: int, seconds: float) -> list[list[int]] | None:
        """By step the likeliest tokens of up to `most` steps in a row, at least one; None where there is no tape.

        The first step after which a row's answer ends is the last one.
        """
        step = self._steps.get(self._key(rows))
        if step is None or not isinstance(step.recording, Tape):
            return None
        step.write(rows, None)
        return step.onward(step.recording).run(most, [r.end_ids for row in rows if (r := row.sampling)], seconds)

    def _key(self, rows: Sequence[StepRow]) -> _Key | None:
        """None where a step of this size is not worth a recording, or not each row is one token's."""
        most, count = MOST_ROWS if self.sizes is None else self.sizes[-1], len(rows)
        if count > most or not all(row.decodes for row in rows):
            return None
        size = count if self.sizes is None else next(size for size in self.sizes if size >= count)
        looking = {bool(row.inputs.crossed) for row in rows} if self._crosses else {False}
        return _Key(size, any(row.adapter >= 0 for row in rows), frozenset(looking))

    def forget(self) -> None:
        """The model has changed: record anew, in new memory, since a pool whose last graph is gone takes no other."""
        self._steps.clear()
        self._record = self._recorder()

    def _recorder(self) -> Record:
        """Recordings share the memory between their kernels."""
        if self._device.type == "cpu":
            return partial(Tape.record, arena=Arena())
        return partial(Graph.capture, pool=torch.cuda.graph_pool_handle())


class _Layout(NamedTuple):
    """How sequences are kept: the groups of layers, tokens of a block, and tokens of the longest sequence."""

    kinds: tuple[Kind, ...]
    block_size: int
    longest: int

    def most_blocks(self, kind: Kind) -> int:
        """Blocks of the longest sequence in a group of that kind."""
        return -(-(self.longest if kind.crossed is None else kind.crossed) // self.block_size)


class _Tables:
    """[n, most blocks] int32: the blocks of `n` rows."""

    def __init__(self, n: int, most_blocks: int, memory: HostMemory) -> None:
        self._most = most_blocks
        self._numbers, numbers = memory.take(n * most_blocks, torch.int32)
        self.tensor = numbers.view(n, most_blocks)

    def write(self, i: int, blocks: Sequence[int]) -> None:
        """Row i has these."""
        first = i * self._most
        self._numbers[first : first + len(blocks)] = array("i", blocks)


class _PagedRows:
    """Where the tokens of `n` rows are kept by one group of layers."""

    def __init__(self, n: int, most_blocks: int, block_size: int, memory: HostMemory) -> None:
        self._size, self._tables = block_size, _Tables(n, most_blocks, memory)
        self._slots, slots = memory.take(n, torch.int64)
        self.pages = Pages(self._tables.tensor, slots)

    def write(self, i: int, row: StepRow, blocks: Sequence[int]) -> None:
        """Row i has these blocks, and its token comes at its place in them."""
        self._slots[i] = blocks[row.start // self._size] * self._size + row.start % self._size
        self._tables.write(i, blocks)

    def skip(self, i: int) -> None:
        """Row i is nobody's, and is not kept."""
        self._slots[i] = -1


class _CrossedRows:
    """Where what `n` rows look at beside their tokens is kept by one group of layers."""

    def __init__(self, n: int, most_blocks: int, looking: Set[bool], memory: HostMemory) -> None:
        self._tables = _Tables(n, most_blocks, memory)
        self._lens, lens = memory.take(n, torch.int32)
        self._looks, looks = memory.take(n, torch.bool)
        mask = looks if len(looking) > 1 else None
        self.crossing = Crossing(self._tables.tensor, lens, None, None, looking=mask, nobody=True not in looking)

    def write(self, i: int, row: StepRow, blocks: Sequence[int]) -> None:
        """Row i looks at what is in these blocks, if there are any."""
        self._lens[i], self._looks[i] = row.inputs.num_seen, bool(blocks)
        self._tables.write(i, blocks)

    def skip(self, i: int) -> None:
        """Row i is nobody's, and looks at nothing."""
        self._lens[i], self._looks[i] = 0, False


class _StateRows:
    """Where the states of `n` rows are kept by one group of layers."""

    def __init__(self, n: int, memory: HostMemory) -> None:
        self._read, read = memory.take(n, torch.int64)
        self._write, write = memory.take(n, torch.int64)
        self._fresh, fresh = memory.take(n, torch.bool)
        self.slots = Slots(read, write, fresh)

    def write(self, i: int, row: StepRow, blocks: Sequence[int]) -> None:
        """Row i reads the first of these slots and writes the second; at the start of its sequence there is nothing."""
        self._read[i], self._write[i] = blocks
        self._fresh[i] = row.start == 0

    def skip(self, i: int) -> None:
        """Row i is nobody's, and is not kept."""
        self._read[i] = self._write[i] = -1
        self._fresh[i] = True


_Rows = _PagedRows | _StateRows | _CrossedRows


def _rows(kind: Kind, n: int, layout: _Layout, looking: Set[bool], memory: HostMemory) -> _Rows:
    """Where what a group of layers of that kind keeps of `n` rows lies."""
    if kind.fixed is not None:
        return _StateRows(n, memory)
    if kind.crossed is not None:
        return _CrossedRows(n, layout.most_blocks(kind), looking, memory)
    return _PagedRows(n, layout.most_blocks(kind), layout.block_size, memory)


class _Step:
    """The input of a step of `n` rows, in memory that stays where it is."""

    def __init__(
        self,
        key: _Key,
        layout: _Layout,
        caches: Sequence[tuple[Tensor, ...]],
        device: torch.device,
    ) -> None:
        n = self._size = key.size
        self.recording: Recording | None = None
        words = sum(3 * n + n * layout.most_blocks(kind) // 2 + 1 for kind in layout.kinds)
        memory = self._memory = HostMemory(4 * n + words, device)
        self._tokens, tokens = memory.take(n, torch.int64)
        self._positions, positions = memory.take(n, torch.int64)
        self._lengths, lengths = memory.take(n, torch.int32)
        self._adapters, self.adapters = memory.take(n, torch.int32)
        self._groups = {g: _rows(kind, n, layout, key.looking, memory) for g, kind in enumerate(layout.kinds)}
        groups = self._groups.items()
        self.batch = Batch(
            token_ids=tokens,
            positions=positions,
            query_starts=torch.arange(n + 1, dtype=torch.int32, device=device),
            context_lens=lengths,
            pages={g: rows.pages for g, rows in groups if isinstance(rows, _PagedRows)},
            states={g: rows.slots for g, rows in groups if isinstance(rows, _StateRows)},
            output_rows=None,
            caches=caches,
            crossings={g: rows.crossing for g, rows in groups if isinstance(rows, _CrossedRows)},
        )

    def onward(self, tape: Tape[Found]) -> Onward:
        """The tape on its way, while each row's next token comes into the same block."""
        batch = self.batch
        slots = [pages.slots for pages in batch.pages.values()]
        return Onward(tape, tape.output.best_R, batch.token_ids, [batch.positions, batch.context_lens, *slots])

    def write(self, rows: Sequence[StepRow], tokens: Tensor | None) -> None:
        """Put the rows where the recorded kernels read them. What is left of the step's rows comes to nothing."""
        self._memory.wait()
        for i, row in enumerate(rows):
            start = row.start
            # Beyond a prompt that has several axes of positions a token's position is one and the same on each.
            self._tokens[i], self._positions[i] = row.tokens[0], start + row.inputs.shift
            self._lengths[i], self._adapters[i] = start + 1, row.adapter
            for g, group in self._groups.items():
                group.write(i, row, row.blocks[g])
        for i in range(len(rows), self._size):
            self._tokens[i] = self._positions[i] = 0
            self._lengths[i], self._adapters[i] = 1, -1
            for group in self._groups.values():
                group.skip(i)
        self._memory.send()
        if tokens is not None:
            self.batch.token_ids[: len(rows)].copy_(tokens)
