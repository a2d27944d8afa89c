"""What recurrent operations keep: a state for each sequence of a ragged batch, read from one slot, written to another.

Knows nothing of what a state means. Shapes: T tokens, S sequences; states are [slots, ...].
"""

from typing import NoReturn

import torch
from torch import Tensor

from bestiary_kernels import library

__all__ = ["are_known", "check", "fail", "load", "spans", "store"]


def spans(operation: str, query_starts: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Where the tokens of each sequence begin, and how many there are, int64 [S] each.

    Raises ValueError where the starts do not rise from 0 to the number of tokens.
    """
    starts, lengths = query_starts[:-1].long(), query_starts.diff().long()
    if query_starts[0] != 0 or query_starts[-1] != tokens or bool((lengths < 0).any()):
        fail(operation, library.BAD_RAGGED, tokens)
    return starts, lengths


def check(operation: str, read_slots: Tensor, write_slots: Tensor, query_starts: Tensor, fresh: Tensor) -> None:
    """Raise ValueError where there is not one slot to read and one to write for each sequence."""
    (sequences,) = fresh.shape
    shapes = (tuple(read_slots.shape), tuple(write_slots.shape), tuple(query_starts.shape))
    if shapes != ((sequences,), (sequences,), (sequences + 1,)) or fresh.dtype is not torch.bool:
        raise ValueError(f"{operation}: slots, starts and fresh (bool) do not fit {sequences} sequences")


def are_known(states: Tensor, read_slots: Tensor, write_slots: Tensor, query_starts: Tensor, fresh: Tensor) -> bool:
    """Whether the C++ functions know the layouts: all is dense."""
    return (
        torch.int64 is read_slots.dtype is write_slots.dtype
        and query_starts.dtype is torch.int32
        and states.is_contiguous()
        and read_slots.is_contiguous()
        and write_slots.is_contiguous()
        and query_starts.is_contiguous()
        and fresh.is_contiguous()
    )


def fail(operation: str, status: int, tokens: int) -> NoReturn:
    """Raise what a C++ function's nonzero status means."""
    if status == library.BAD_RAGGED:
        raise ValueError(f"{operation}: query_starts must rise from 0 to the number of tokens, {tokens}")
    library.fail(operation, status)


def load(operation: str, states: Tensor, read_slots: Tensor, write_slots: Tensor, fresh: Tensor) -> Tensor:
    """A copy of each sequence's state in float32, [S, ...], zero where it is fresh, whatever its slot to read then is.

    Raises IndexError where a slot, of these or of those to write, lies outside the states.
    """
    read_slots = torch.where(fresh, write_slots, read_slots)
    slots = torch.cat([read_slots, write_slots])
    if bool(((slots < 0) | (slots >= len(states))).any()):
        library.fail(operation, library.BAD_SLOT)
    kept = states[read_slots].float()
    return kept.masked_fill(fresh.view(-1, *[1] * (kept.dim() - 1)), 0.0)


def store(states: Tensor, write_slots: Tensor, new: Tensor) -> None:
    """Write each sequence's new state, rounded to the states' dtype."""
    states[write_slots] = new.to(states.dtype)
