"""Packed weights of bfloat16 in twelve bits, exactly. Knows no product.

Four bits say as much of an exponent as eight: the fifteen commonest exponents of a trained matrix leave out some ten
thousandths of its weights, which are listed beside it. Decoding reads three quarters of the bytes, and memory that is
read is what it takes time for. That exponents say little is known from DFloat11 (arXiv 2504.11651), which codes them by
Huffman; codes of one length can be looked up in registers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from struct import Struct

import torch
from torch import Tensor

from bestiary_kernels import library
from bestiary_kernels.linear import reference
from bestiary_kernels.memory import lasting

__all__ = ["VARIABLE", "Squeezed"]

#: Set to 0, nothing is squeezed.
VARIABLE = "BESTIARY_SQUEEZE"
#: Bytes of a weight that is worth it: smaller ones stay in the caches, where widening would be felt.
_LEAST = 1 << 19
#: One exception in so many weights is the most that there may be.
_MOST_EXCEPTIONS = 256
#: Weights that are looked at to find the commonest exponents.
_SAMPLED = 1 << 16
_CALL = Struct("PPqqPP16s")  # SqueezedCall in squeezed.hpp


class Squeezed:
    """A packed weight [blocks, K / 2, 64, 2] and what makes it: codes, exceptions and the exponents of the codes."""

    def __init__(self, packed: Tensor, outputs: int, exponents: Tensor, starts: Tensor, exceptions: int) -> None:
        blocks, steps = packed.shape[:2]
        self.outputs, self.inputs = outputs, 2 * steps
        self.exponents, self.starts = exponents, starts
        self.codes = lasting((blocks, steps, reference.SQUEEZED_BYTES), torch.uint8)
        self.exceptions = torch.empty(max(exceptions, 1), dtype=torch.int32)

    @classmethod
    def of(cls, packed: Tensor, outputs: int) -> Squeezed | None:
        """The same weight in twelve bits, or None where that is not worth it or this machine has no kernels for it.

        Raises ValueError where the variable says neither 0 nor 1.
        """
        kernels = library.native(packed)
        if kernels is None or not _is_worth(packed.shape):
            return None
        exponents = _commonest(packed)
        tiles = -(-packed.shape[1] // reference.SQUEEZED_TILE)
        counts = torch.zeros(packed.shape[0] * tiles, dtype=torch.int32)
        call = _CALL.pack(0, 0, outputs, 2 * packed.shape[1], 0, 0, exponents.numpy().tobytes())
        kernels.squeeze(call, packed.data_ptr(), counts.data_ptr())
        starts = torch.zeros(counts.numel() + 1, dtype=torch.int32)
        torch.cumsum(counts, 0, dtype=torch.int32, out=starts[1:])
        exceptions = int(starts[-1])
        if exceptions > packed.numel() // _MOST_EXCEPTIONS:
            return None
        made = cls(packed, outputs, exponents, starts, exceptions)
        kernels.squeeze(made.call(None), packed.data_ptr(), None)
        return made

    @staticmethod
    def size(packed: Sequence[int]) -> int | None:
        """Bytes of a packed weight of that shape without its exceptions; None where it stays as it is."""
        blocks, steps = packed[:2]
        starts = blocks * -(-steps // reference.SQUEEZED_TILE) + 1
        return blocks * steps * reference.SQUEEZED_BYTES + starts * 4 if _is_worth(packed) else None

    def call(self, bias_N: Tensor | None) -> bytes:
        """What the kernels take, with their addresses; it holds as long as this and the bias do."""
        return _CALL.pack(
            self.codes.data_ptr(),
            0 if bias_N is None else bias_N.data_ptr(),
            self.outputs,
            self.inputs,
            self.starts.data_ptr(),
            self.exceptions.data_ptr(),
            self.exponents.numpy().tobytes(),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        return self.codes.nbytes + self.starts.nbytes + self.exceptions.nbytes

    def widen(self, packed: Tensor) -> Tensor:
        """Write the weight as it was into `packed`, and return it."""
        kernels = library.native(packed)
        if kernels is None or kernels.unsqueeze is None:
            return packed.copy_(reference.unsqueeze(self.codes, self.exponents, self.starts, self.exceptions))
        kernels.unsqueeze(self.call(None), packed.data_ptr())
        return packed

    def packed(self) -> Tensor:
        """The weight as it was, in memory of its own."""
        return self.widen(torch.empty(reference.packed_shape(self.outputs, self.inputs), dtype=torch.bfloat16))


def _is_worth(packed: Sequence[int]) -> bool:
    kernels = library.active()
    return _is_wanted() and kernels is not None and kernels.squeeze is not None and 2 * prod(packed) >= _LEAST


def _is_wanted() -> bool:
    said = os.environ.get(VARIABLE, "1")
    if said not in ("0", "1"):
        raise ValueError(f"{VARIABLE}={said!r} is unknown; choose 0 or 1")
    return said == "1"


def _commonest(packed: Tensor) -> Tensor:
    """The fifteen commonest exponents but 0 (which has a code of its own), and 0: uint8 [16]."""
    stride = packed.numel() // _SAMPLED | 1  # odd: no column is favoured
    some = packed.view(torch.int16).flatten()[::stride]
    counts = torch.bincount((some >> 7).bitwise_and_(255).int(), minlength=256)
    counts[0] = -1
    chosen = counts.topk(15).indices.sort().values
    return torch.cat((chosen, chosen.new_zeros(1))).to(torch.uint8)
