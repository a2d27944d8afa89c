"""A step recorded once and replayed with one call: for the CPU what a captured graph is for a GPU.

Knows nothing of models. What it records are calls of the C++ kernels with their addresses, so a replay computes with
whatever now lies in the same memory; whoever records keeps inputs in place and writes new values into them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bestiary_kernels import library

__all__ = ["Tape"]

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
)
#: Torch operations that compute nothing: they take memory, or look at it in another shape.
_IDLE = ("new_empty", "empty", "view", "split_with_sizes", "slice", "select", "unsqueeze", "alias", "detach", "t")


class _Slot(ctypes.Union):
    _fields_ = (("integer", ctypes.c_int64), ("number", ctypes.c_double), ("pointer", ctypes.c_void_p))


class _Recorded(ctypes.Structure):
    _fields_ = (("operation", ctypes.c_int64), ("arguments", ctypes.POINTER(_Slot)))


class Tape:
    """The kernels that a function called, in their order, and the memory that they share."""

    def __init__(self, output: Tensor, entries: list[tuple[int, Any]], kept: list[Any], replay: Any) -> None:
        #: What the function returned; a replay writes it anew, in place.
        self.output = output
        self._kept = (entries, kept)  # whose addresses the entries hold
        self._entries = (_Recorded * len(entries))(*(_Recorded(operation, slots) for operation, slots in entries))
        self._names = [_OPERATIONS[operation] for operation, _ in entries]
        self._at = ctypes.c_int64()
        self._replay = replay

    @classmethod
    def record(cls, function: Callable[[], Tensor]) -> tuple[Tensor, Tape | None]:
        """Run `function`; return its result, and a tape if everything that it computed was a kernel of ours."""
        kernels = library.active()
        if kernels is None:
            return function(), None
        recorder = _Recorder(kernels)
        with library.redirected(recorder), recorder:
            output = function()
        if recorder.strangers or not recorder.entries:
            return output, None
        return output, cls(output, recorder.entries, recorder.kept, kernels.replay)

    def replay(self) -> Tensor:
        """Compute again, from what the inputs' memory holds now, and return `output`. Raises as the kernels do."""
        failed = self._replay(self._entries, len(self._names), ctypes.byref(self._at))
        if failed:
            library.fail(self._names[self._at.value], failed)
        return self.output


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stands in for the kernels, calls and notes them, and watches what torch itself does meanwhile."""

    def __init__(self, kernels: library.Kernels) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.variant = kernels.variant
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
        """Keep every tensor alive, as its memory is part of the tape; note what computes without us."""
        name = func.overloadpacket.__name__
        if name not in _IDLE:
            self.strangers.add(name)
        result = func(*args, **(kwargs or {}))
        self.kept.append(result)
        return result
