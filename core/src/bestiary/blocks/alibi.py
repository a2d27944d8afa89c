"""Attention with linear biases (Press et al. 2021, arXiv 2108.12409): far keys score less, by a slope for each head."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Alibi"]


@dataclass(frozen=True)
class Alibi:
    """What is added to a head's scores: slope x factor x the key's position.

    `rounded`: the product is formed in bfloat16, as some models were trained.
    """

    heads: int
    factor: float = 1.0
    rounded: bool = False

    def slopes(self) -> Tensor:
        """[heads] float32, or bfloat16 where the product is rounded.

        As many heads as a power of two take a geometric sequence that ends at 2^-8; for other numbers the sequence of
        the next lower power is followed by every other element of that of the next higher one.
        """
        lower = 2 ** math.floor(math.log2(self.heads))
        found = _sequence(lower) + _sequence(2 * lower)[::2][: self.heads - lower]
        return torch.tensor(found).mul(self.factor).to(torch.bfloat16 if self.rounded else torch.float32)


def _sequence(heads: int) -> list[float]:
    return [2.0 ** (-8 * (i + 1) / heads) for i in range(heads)]
