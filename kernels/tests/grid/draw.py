"""What a case needs: numbers that somebody draws, tensors made of them, and how near two results must be."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

__all__ = [
    "CASES",
    "DTYPES",
    "Case",
    "Draw",
    "Seeded",
    "apart",
    "case",
    "close",
    "lengths",
    "normal",
    "poisoned",
    "within",
]

T = TypeVar("T")
DTYPES = (torch.float32, torch.bfloat16)
#: How far a result may be from float64's, relative to the size of what is added up.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Draw(Protocol):
    """Who draws."""

    def integer(self, low: int, high: int) -> int:
        """From low to high, both included."""

    def choice(self, options: Sequence[T]) -> T:
        """One of them."""


@dataclass
class Seeded:
    """Drawn from a seed."""

    source: random.Random

    def integer(self, low: int, high: int) -> int:
        return self.source.randint(low, high)

    def choice(self, options: Sequence[T]) -> T:
        return self.source.choice(options)


#: Draws, computes on the device, and raises AssertionError where the result is not near.
Case = Callable[[Draw, torch.device], None]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Register a case by its name."""
    assert function.__name__ not in CASES
    CASES[function.__name__] = function
    return function


def normal(draw: Draw, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers, the same on every device."""
    generator = torch.Generator().manual_seed(draw.integer(0, 2**31))
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory in which nothing may be taken for a result."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def within(draw: Draw, *shape: int, more: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers in the rows of a buffer that are longer by one of `more`, perhaps only in every other column.

    What else is in the buffer is no number.
    """
    step = draw.choice((1, 1, 1, 1, 1, 1, 1, 2))
    whole = poisoned(*shape[:-1], step * (shape[-1] + draw.choice(more)), dtype=dtype, device=device)
    return whole[..., : step * shape[-1] : step].copy_(normal(draw, *shape, dtype=dtype, device=device))


def apart(draw: Draw, numbers: Tensor) -> Tensor:
    """A line of numbers as it is, or each with a place of memory between it and the next."""
    return numbers.repeat_interleave(2)[::2] if draw.choice((True, False, False, False)) else numbers


def lengths(draw: Draw, most_sequences: int, longest: int) -> list[int]:
    """Tokens of each sequence; some are empty."""
    return [draw.choice((0, 1, draw.integer(0, longest))) for _ in range(draw.integer(1, most_sequences))]


def close(found: Tensor, wanted: Tensor, scale: float | Tensor | None = None) -> None:
    """`wanted` is float64; `scale` is the size of what was added up, where that is more than what came of it.

    Without it the size of a value counts, and of one near zero that of its neighbours.
    """
    assert found.shape == wanted.shape, f"{tuple(found.shape)} instead of {tuple(wanted.shape)}"
    if not found.numel():
        return
    wanted = wanted.to(found.device)
    typical = wanted.abs().mean() if scale is None else torch.as_tensor(scale, device=found.device)
    allowed = _TOLERANCE[found.dtype] * torch.maximum(wanted.abs(), typical)
    off = (found.double() - wanted).abs()
    is_far = ~(off <= allowed)  # NaN is far
    assert not is_far.any(), (
        f"{int(is_far.sum())} of {found.numel()} numbers are off; the worst by "
        f"{float((off / allowed).nan_to_num(nan=float('inf')).max()):.3g} times what is allowed"
    )
