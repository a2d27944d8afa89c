"""Weights as small whole numbers with scales, in torch: what the codes mean, how they lie, and the product with them.

Shapes: N outputs, K inputs, G groups of inputs, B blocks of 64 outputs, S steps of two inputs.
"""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "COLUMNS",
    "dequantise",
    "linear",
    "pack",
    "pack_rows",
    "pack_scales",
    "packed_shape",
    "quantise",
    "unpack",
    "unpack_rows",
    "unpack_scales",
]

COLUMNS = 64


def quantise(weight_NK: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, K] and scales, so that code * scale is the number of those that can be said nearest to a weight.

    8 bits: codes -127 .. 127 and a float32 scale for each row, [N, 1]. 4 bits: codes -8 .. 7 and a bfloat16 scale for
    every `group` inputs of a row, [N, G], whose sign gives the number farthest from 0 the code -8.
    """
    wide = weight_NK.float()
    if bits == 8:
        scales = wide.abs().amax(1, keepdim=True) / 127
        return _codes(wide, scales, 127, 127), scales
    inputs = wide.shape[1]
    grouped = functional.pad(wide, (0, -inputs % group)).view(len(wide), -1, group)
    farthest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))
    scales = (farthest / -8).bfloat16()
    return _codes(grouped, scales.float(), 8, 7).flatten(1)[:, :inputs], scales[:, :, 0]


def _codes(wide: Tensor, scales: Tensor, below: int, above: int) -> Tensor:
    return (wide / scales.where(scales != 0, 1.0)).round_().clamp_(-below, above).to(torch.int8)


def dequantise(codes_NK: Tensor, scales_NG: Tensor, group: int) -> Tensor:
    """The weights that codes and scales stand for, float32 [N, K]."""
    inputs = codes_NK.shape[1]
    if scales_NG.shape[1] == 1:
        return codes_NK * scales_NG.float()
    return codes_NK * scales_NG.float().repeat_interleave(group, 1)[:, :inputs]


def packed_shape(outputs: int, inputs: int, bits: int, in_pairs: bool) -> tuple[int, ...]:
    """What `pack` makes of codes [outputs, inputs]."""
    blocks, steps = -(-outputs // COLUMNS), -(-inputs // 2)
    if bits == 8:
        return (blocks, steps, COLUMNS, 2) if in_pairs else (blocks, steps, 2, COLUMNS)
    return (blocks, steps, 16, 2, 2) if in_pairs else (blocks, steps, COLUMNS // 2, 2)


def pack(codes_NK: Tensor, bits: int, in_pairs: bool) -> Tensor:
    """Codes as the C++ product reads them, in the form for machines that multiply pairs of bfloat16 or for the others.

    8 bits: int8 [B, S, 64, 2], each a sign and a magnitude; or [B, S, 2, 64]. 4 bits: bytes of two codes, the lower
    half first. For pairs [B, S, 16, 2, 2]: of the 4 codes in the two bytes that belong to output c and input i, number
    j is that of output 16 j + c. Else [B, S, 32, 2]: outputs c and 32 + c, and of every 16 bytes' outputs the second
    and third four change places.
    """
    outputs, inputs = codes_NK.shape
    whole = functional.pad(codes_NK, (0, inputs % 2, 0, -outputs % COLUMNS))
    steps = whole.shape[1] // 2
    if bits == 8:
        by_step = whole.view(-1, COLUMNS, steps, 2).transpose(1, 2)
        return _signed(by_step).contiguous() if in_pairs else by_step.transpose(2, 3).contiguous()
    codes = whole.view(torch.uint8)
    if in_pairs:
        codes = codes.view(-1, 2, 2, 16, steps, 2)
        return _two_in_one(codes[:, :, 0], codes[:, :, 1]).permute(0, 3, 2, 4, 1).contiguous()
    codes = codes.view(-1, 2, 2, 2, 2, 4, steps, 2)
    return _two_in_one(codes[:, 0], codes[:, 1]).permute(0, 5, 1, 3, 2, 4, 6).flatten(2, 5).contiguous()


def unpack(packed: Tensor, bits: int, outputs: int, inputs: int) -> Tensor:
    """The codes int8 [N, K] that `pack` was given; of some blocks alone, where there are fewer than N needs."""
    if bits == 8:
        by_step = _signed(packed) if packed.shape[3] == 2 else packed.transpose(2, 3)
        return by_step.transpose(1, 2).flatten(2).flatten(0, 1)[:outputs, :inputs]
    if packed.dim() == 5:
        codes = torch.stack(_one_by_one(packed.permute(0, 4, 2, 1, 3)), 2)
    else:
        fours = packed.view(*packed.shape[:2], 2, 2, 2, 4, 2).permute(0, 2, 4, 3, 5, 1, 6)
        codes = torch.stack(_one_by_one(fours), 1)
    return codes.reshape(-1, 2 * packed.shape[1])[:outputs, :inputs]


def _signed(codes: Tensor) -> Tensor:
    """Numbers above -128 as a sign and seven bits of magnitude, or these as numbers again."""
    return torch.where(codes < 0, -128 - codes, codes)


def pack_scales(scales_NG: Tensor) -> Tensor:
    """Scales as they lie beside packed codes, [B, G, 64]."""
    whole = functional.pad(scales_NG, (0, 0, 0, -scales_NG.shape[0] % COLUMNS))
    return whole.view(-1, COLUMNS, scales_NG.shape[1]).transpose(1, 2).contiguous()


def unpack_scales(packed: Tensor, outputs: int) -> Tensor:
    """The scales [N, G] that `pack_scales` was given."""
    return packed.transpose(1, 2).flatten(0, 1)[:outputs]


def pack_rows(codes_NK: Tensor, bits: int, group: int) -> Tensor:
    """Codes row by row as a GPU reads them: int8 [N, K], or bytes [N, G * group / 2].

    The low half of a byte is an input of the first half of its group, the high one that of the second half.
    """
    if bits == 8:
        return codes_NK.contiguous()
    whole = functional.pad(codes_NK, (0, -codes_NK.shape[1] % group)).view(torch.uint8)
    halves = whole.view(len(whole), -1, 2, group // 2)
    return _two_in_one(halves[:, :, 0], halves[:, :, 1]).flatten(1)


def unpack_rows(packed: Tensor, bits: int, group: int, inputs: int) -> Tensor:
    """The codes int8 [N, K] that `pack_rows` was given."""
    if bits == 8:
        return packed
    return torch.stack(_one_by_one(packed.view(len(packed), -1, group // 2)), 2).flatten(1)[:, :inputs]


def _two_in_one(low: Tensor, high: Tensor) -> Tensor:
    return (low & 15) | (high << 4)


def _one_by_one(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high codes of bytes, with their signs."""
    signed = packed.view(torch.int8)
    return (signed << 4) >> 4, signed >> 4


def linear(x_TK: Tensor, codes_NK: Tensor, scales_NG: Tensor, group: int, bias_N: Tensor | None) -> Tensor:
    """x times the weights that codes and scales stand for, plus the bias, in float32 and rounded once: [T, N]."""
    y = x_TK.float() @ dequantise(codes_NK, scales_NG, group).T
    return (y if bias_N is None else y + bias_N.float()).to(x_TK.dtype)
