"""A step recorded once and replayed with one call: for the CPU what a captured graph is for a GPU.

Knows nothing of models. What it records are calls of the C++ kernels with their addresses, so a replay computes with
whatever now lies in the same memory; whoever records keeps inputs in place and writes new values into them.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bestiary_kernels import library

__all__ = ["Arena", "Onward", "Tape"]

#: What a recorded function returns: tensors.
Found = TypeVar("Found")

#: In the order of the switch in tape.cpp.
_OPERATIONS = (
    "add_rms_norm",
    "gated_activation",
    "rotary_cache_write",
    "paged_attention",
    "embedding",
    "embedding_packed",
    "linear_rows",
    "linear_packed",
    "lora",
    "add_layer_norm",
    "activation",
    "rotary",
    "cache_write",
    "route",
    "moe",
    "causal_conv",
    "selective_scan",
    "quantised_linear",
    "add",
    "scaled",
    "heads_linear",
    "linear_squeezed",
    "embedding_squeezed",
    "experts_linear",
    "greedy",
    "moe_squeezed",
    "experts_squeezed",
    "linear_packed_many",
    "linear_squeezed_many",
)
#: Torch operations that only look at memory in another shape.
_VIEWS = ("view", "split_with_sizes", "slice", "select", "unsqueeze", "alias", "detach", "t")


class _Slot(ctypes.Union):
    _fields_ = (("integer", ctypes.c_int64), ("number", ctypes.c_double), ("pointer", ctypes.c_void_p))


class _Recorded(ctypes.Structure):
    _fields_ = (("operation", ctypes.c_int64), ("arguments", ctypes.POINTER(_Slot)))


class _Counter(ctypes.Structure):
    _fields_ = (("numbers", ctypes.c_void_p), ("bytes", ctypes.c_int64))


class _Onward(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("best", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("counters", ctypes.POINTER(_Counter)),
        ("num_counters", ctypes.c_int64),
        ("ends", ctypes.c_void_p),
        ("num_ends", ctypes.c_int64),
        ("most", ctypes.c_int64),
        ("nanoseconds", ctypes.c_int64),
        ("found", ctypes.c_void_p),
    )


class Arena:
    """Memory that recordings share: of tapes that are never replayed at the same time, each starts from its beginning.

    What a tape leaves there holds until the next one is recorded or replayed.
    """

    _CHUNK_BYTES, _ALIGNMENT = 1 << 22, 64

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._at, self._used = 0, 0

    def rewind(self) -> None:
        """Begin again with the first byte."""
        self._at, self._used = 0, 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of uninitialised memory, dense."""
        size = math.prod(shape) * dtype.itemsize
        while self._at < len(self._chunks) and self._used + size > self._chunks[self._at].numel():
            self._at, self._used = self._at + 1, 0
        if self._at == len(self._chunks):
            self._chunks.append(torch.empty(max(size, self._CHUNK_BYTES), dtype=torch.uint8))
        taken = self._chunks[self._at][self._used : self._used + size].view(dtype).view(shape)
        self._used += -(-size // self._ALIGNMENT) * self._ALIGNMENT
        return taken


class Tape(Generic[Found]):
    """The kernels that a function called, in their order, and the memory that they share."""

    def __init__(self, output: Found, entries: list[tuple[int, Any]], kept: list[Any], kernels: Any) -> None:
        #: What the function returned; a replay writes it anew, in place.
        self.output = output
        self._kept = (entries, kept)  # whose addresses the entries hold
        self._entries = (_Recorded * len(entries))(*(_Recorded(operation, slots) for operation, slots in entries))
        self._names = [_OPERATIONS[operation] for operation, _ in entries]
        self._at = ctypes.c_int64()
        self._kernels = kernels

    @classmethod
    def record(cls, function: Callable[[], Found], arena: Arena | None = None) -> tuple[Found, Tape[Found] | None]:
        """Run `function`; return its result, and a tape if everything that it computed was a kernel of ours.

        Memory between the kernels comes from `arena`, or is the tape's own.
        """
        kernels = library.active()
        if kernels is None:
            return function(), None
        recorder = _Recorder(kernels, arena or Arena())
        with library.redirected(recorder), recorder:
            output = function()
        if recorder.strangers or not recorder.entries:
            return output, None
        return output, cls(output, recorder.entries, recorder.kept, kernels)

    def replay(self) -> Found:
        """Compute again, from what the inputs' memory holds now, and return `output`. Raises as the kernels do."""
        failed = self._kernels.replay(self._entries, len(self._names), ctypes.byref(self._at))
        if failed:
            library.fail(self._names[self._at.value], failed)
        return self.output

    def run_on(self, step: ctypes.Structure, done: ctypes.c_int64) -> None:
        """Compute again and again, as `Onward` says; how often is then in `done`."""
        where = ctypes.byref(self._at), ctypes.byref(step), ctypes.byref(done)
        failed = self._kernels.replay_on(self._entries, len(self._names), *where)
        if failed and not done.value:
            library.fail(self._names[self._at.value], failed)


class Onward:
    """A tape whose steps follow each other: what one finds the next one begins with, and its counters go up by one.

    `best` [R] int64 is what a step finds, `tokens` [R] int64 what it begins with; `counters` [R] are int32 or int64.
    """

    def __init__(self, tape: Tape[Any], best: Tensor, tokens: Tensor, counters: Sequence[Tensor]) -> None:
        if not all(x.is_contiguous() and x.shape == best.shape for x in (best, tokens, *counters)):
            raise ValueError("Onward: best, tokens and counters must be dense, and one number a row")
        self._tape, self._kept = tape, (best, tokens, counters)
        pairs = [_Counter(counter.data_ptr(), counter.element_size()) for counter in counters]
        ups = (_Counter * len(pairs))(*pairs)
        self._step = _Onward(best.numel(), best.data_ptr(), tokens.data_ptr(), ups, len(pairs))

    def run(self, most: int, ends: Sequence[Sequence[int]], seconds: float) -> list[list[int]]:
        """Compute up to `most` steps one after the other; the tokens of each step that was computed, at least one.

        None comes after one in which a row finds one of its `ends`, or -1, nor one that would likely end later than
        `seconds` from now. What fails after the first step is left to whoever asks for it again.
        """
        step, rows, num_ends = self._step, self._step.rows, max(map(len, ends))
        found, done = (ctypes.c_int64 * (most * rows))(), ctypes.c_int64()
        padded = [end for each in ends for end in (*each, *[-1] * (num_ends - len(each)))]
        known_ends = (ctypes.c_int64 * len(padded))(*padded)
        step.found, step.ends, step.num_ends = ctypes.addressof(found), ctypes.addressof(known_ends), num_ends
        step.most, step.nanoseconds = most, int(seconds * 1e9)
        self._tape.run_on(step, done)
        return [found[at * rows : (at + 1) * rows] for at in range(done.value)]


class _Notes:
    """Stands in for the kernels, calls and notes them, and watches what torch itself does meanwhile."""

    def __init__(self, kernels: library.Kernels, arena: Arena) -> None:
        super().__init__()
        arena.rewind()
        self._arena = arena
        self.variant, self.has_pairs = kernels.variant, kernels.has_pairs
        self.entries: list[tuple[int, Any]] = []
        self.kept: list[Any] = []
        self.strangers: set[str] = set()
        for number, name in enumerate(_OPERATIONS):
            function = getattr(kernels, name)
            setattr(self, name, None if function is None else self._noting(number, function))

    def _noting(self, number: int, function: Any) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            kinds = library.SIGNATURES[_OPERATIONS[number]]
            self.entries.append((number, (_Slot * len(kinds))(*map(self._slot, kinds, arguments))))
            return int(function(*arguments))

        return call

    def _slot(self, kind: Any, argument: Any) -> _Slot:
        if isinstance(argument, bytes):
            self.kept.append(argument)
            return _Slot(pointer=ctypes.cast(ctypes.c_char_p(argument), ctypes.c_void_p).value)
        return _Slot(number=argument) if kind is ctypes.c_float else _Slot(integer=argument or 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Give memory from the arena and keep it alive, as it is part of the tape; note what computes without us."""
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name == "new_empty":
            result = self._arena.take(args[1], kwargs.get("dtype") or args[0].dtype)
        else:
            if name not in _VIEWS:
                self.strangers.add(name)
            result = func(*args, **kwargs)
        self.kept.append(result)
        return result


class _Recorder(_Notes, TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every torch operation while it is entered.

    It inherits `__torch_dispatch__`: one of its own torch would wrap, and the wrapper imports the compiler, which takes
    a second of the first step.
    """
