"""A weight kept as small whole numbers, and its product with rows. Shapes: T rows, N outputs, K inputs, G groups.

Only the weight is small: x, the bias and what comes out keep their dtype, and sums are float32. On a CPU the codes lie
as the C++ product reads them; elsewhere row by row.
"""

from struct import Struct

import torch
from torch import Tensor
from torch.nn import functional

from bestiary_kernels import gpu, library
from bestiary_kernels.memory import lasting
from bestiary_kernels.quantised import reference

__all__ = ["QuantisedLinear", "dequantise", "quantise"]

_CALL = Struct("PPP5q")  # QuantisedCall in cpu.cpp
_GROUPS = (32, 64, 128)
# Outputs that are made at a time, so that what is wide for a moment stays small. A multiple of a block.
_SOME = 1024


def quantise(weight_NK: Tensor, bits: int = 8, group: int = 32) -> tuple[Tensor, Tensor]:
    """Return (codes int8 [N, K], scales [N, G]): a weight is about code * scale.

    8 bits: one float32 scale a row (G is 1), codes -127 .. 127. 4 bits: a bfloat16 scale for every `group` inputs of a
    row, the last of which may be fewer; codes -8 .. 7. Raises ValueError for other bits or groups.
    """
    _check(weight_NK, bits, group)
    return reference.quantise(weight_NK, bits, group)


def dequantise(codes_NK: Tensor, scales_NG: Tensor, group: int = 32) -> Tensor:
    """Return code * scale, float32 [N, K]; exact for 8 bits up to one rounding, and for 4 bits."""
    return reference.dequantise(codes_NK, scales_NG, group)


def _check(weight_NK: Tensor, bits: int, group: int) -> None:
    if weight_NK.dim() != 2 or not weight_NK.is_floating_point() or not weight_NK.shape[1]:
        shape = tuple(weight_NK.shape)
        raise ValueError(f"quantise: weight {weight_NK.dtype} {shape} must be floating point [N, K], K not 0")
    if bits not in (4, 8) or (bits == 4 and group not in _GROUPS):
        raise ValueError(f"quantise: {bits} bits in groups of {group}; there are 8, and 4 in groups of {_GROUPS}")


class QuantisedLinear:
    """A weight [N, K] and an optional bias [N], made ready for `y = x @ weight.T + bias` with the weight in few bits.

    `form` says how the codes lie: "blocks" (on a CPU) or "rows" (on a GPU, and where Triton is interpreted).
    """

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None = None, *, bits: int = 8, group: int = 32) -> None:
        """Quantise. The caller frees its own reference to the weight. Raises ValueError for what does not fit."""
        _check(weight_NK, bits, group)
        if bias_N is not None and (bias_N.shape != weight_NK.shape[:1] or bias_N.dtype is not weight_NK.dtype):
            raise ValueError(
                f"QuantisedLinear: the bias is {bias_N.dtype} {tuple(bias_N.shape)}, "
                f"the weight {weight_NK.dtype} {tuple(weight_NK.shape)}"
            )
        self.outputs, self.inputs = weight_NK.shape
        self.dtype, self.bits, self.group = weight_NK.dtype, bits, group
        self.bias = None if bias_N is None else bias_N.detach().contiguous()
        self.form = "blocks" if weight_NK.is_cpu and gpu.kernels("quantised", weight_NK) is None else "rows"
        kernels = library.native(weight_NK)
        self._in_pairs = kernels is not None and kernels.has_pairs
        self._codes, self._scales = self._quantised(weight_NK.detach().contiguous())
        self._call = _CALL.pack(
            self._codes.data_ptr(),
            self._scales.data_ptr(),
            0 if self.bias is None else self.bias.data_ptr(),
            self.outputs,
            self.inputs + self.inputs % 2,
            bits,
            group,
            library.IS_BF16.get(self.dtype, 0),
        )

    def _quantised(self, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales, as they shall lie."""
        kernels = library.native(weight_NK)
        if kernels is None or self.form == "rows" or self.dtype not in library.IS_BF16 or not weight_NK.numel():
            parts = [self._part(some) for some in torch.split(weight_NK, _SOME)]
            codes, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            return codes, scales
        shape = reference.packed_shape(self.outputs, self.inputs, self.bits, self._in_pairs)
        codes = lasting(shape, torch.int8 if self.bits == 8 else torch.uint8)
        groups, scale = (1, torch.float32) if self.bits == 8 else (-(-self.inputs // self.group), torch.bfloat16)
        scales = torch.empty(shape[0], groups, reference.COLUMNS, dtype=scale)
        failed = kernels.quantise(
            library.IS_BF16[self.dtype],
            self.bits,
            weight_NK.data_ptr(),
            codes.data_ptr(),
            scales.data_ptr(),
            self.outputs,
            self.inputs,
            self.group,
        )
        if failed:
            library.fail("QuantisedLinear", failed)
        return codes, scales

    def _is_for(self, kernels: library.Kernels) -> bool:
        """Whether the codes lie as these kernels read them."""
        lies = self.form == "blocks" and self._in_pairs is kernels.has_pairs
        return lies and self.dtype in library.IS_BF16

    def _part(self, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of some outputs, as they shall lie."""
        codes, scales = reference.quantise(weight_NK, self.bits, self.group)
        if self.form == "rows":
            return reference.pack_rows(codes, self.bits, self.group), scales.contiguous()
        return reference.pack(codes, self.bits, self._in_pairs), reference.pack_scales(scales)

    @staticmethod
    def size(outputs: int, inputs: int, bits: int = 8, group: int = 32) -> int:
        """Bytes of codes and scales for a weight of this shape, without padding."""
        if bits == 8:
            return outputs * (inputs + 4)
        groups = -(-inputs // group)
        return outputs * (-(-inputs // 2) + 2 * groups)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that codes and scales take, padding included; the bias is not counted."""
        return self._codes.nbytes + self._scales.nbytes

    def __call__(self, x_TK: Tensor) -> Tensor:
        """Return x @ weight.T + bias, [T, N], for x [T, K] of the weight's dtype; ValueError if it does not fit."""
        rows, inputs = x_TK.shape
        if inputs != self.inputs or x_TK.dtype is not self.dtype:
            raise ValueError(
                f"QuantisedLinear: x is {x_TK.dtype} with {inputs} inputs, the weight {self.dtype} with {self.inputs}"
            )
        if self.form == "rows" and (on_gpu := gpu.kernels("quantised", x_TK)) is not None:
            found: Tensor = on_gpu.linear(x_TK, self._codes, self._scales, self.bits, self.group, self.bias)
            return found
        kernels = library.native(x_TK)
        if rows == 0 or (library.is_traced(x_TK) and not torch.compiler.is_compiling()):
            return x_TK.new_empty(rows, self.outputs)
        if kernels is None or not self._is_for(kernels):
            product = _operator if library.is_traced(x_TK) else _slowly
            return product(x_TK, self._codes, self._scales, self.bias, self.outputs, self.bits, self.group)
        x = functional.pad(x_TK, (0, 1)) if inputs % 2 else x_TK.contiguous()
        y = x.new_empty(rows, self.outputs)
        failed = kernels.quantised_linear(self._call, x.data_ptr(), y.data_ptr(), rows)
        if failed:
            library.fail("QuantisedLinear", failed)
        return y


def _slowly(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, outputs: int, bits: int, group: int
) -> Tensor:
    """As the reference, some outputs after the other."""
    parts = []
    for first in range(0, outputs, _SOME):
        end = min(first + _SOME, outputs)
        some = _codes_of(codes, scales, slice(first, end), x.shape[1], bits, group)
        parts.append(reference.linear(x, *some, group, None if bias is None else bias[first:end]))
    return torch.cat(parts, 1) if parts else x.new_empty(x.shape[0], 0)


def _codes_of(codes: Tensor, scales: Tensor, some: slice, inputs: int, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of some outputs, the first of which begins a block."""
    if codes.dim() == 2:
        return reference.unpack_rows(codes[some], bits, group, inputs), scales[some]
    blocks, count = slice(some.start // reference.COLUMNS, -(-some.stop // reference.COLUMNS)), some.stop - some.start
    return reference.unpack(codes[blocks], bits, count, inputs), reference.unpack_scales(scales[blocks], count)


@torch.library.custom_op("bestiary::quantised_linear", mutates_args=())
def _operator(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, outputs: int, bits: int, group: int
) -> Tensor:
    """With codes in blocks, of more than two dimensions, or in rows."""
    return _slowly(x, codes, scales, bias, outputs, bits, group)


@_operator.register_fake
def _shape(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, outputs: int, bits: int, group: int
) -> Tensor:
    return x.new_empty(x.shape[0], outputs)
