"""Products with weights of few bits."""

import torch

from bestiary_kernels import QuantisedLinear, dequantise, quantise

from .draw import Draw, case, close, normal, within


@case
def quantised_linear(draw: Draw, device: torch.device) -> None:
    """Against float64 over the weight that codes and scales say; any rows, widths that fill no block and no group."""
    dtype = draw.choice((torch.float32, torch.bfloat16, torch.bfloat16, torch.float16))
    bits, group = draw.choice(((8, 32), (4, 32), (4, 64), (4, 128)))
    rows = draw.choice((0, 1, 2, 3, 5, 6, 7, 16, 17, draw.integer(0, 40), 130))
    outputs = draw.choice((1, 64, 63, 130, 192, draw.integer(1, 200)))
    inputs = draw.choice((1, 2, 31, 32, 96, 128, 300, 576, draw.integer(1, 400)))
    weight = normal(draw, outputs, inputs, dtype=dtype, device=device)
    weight[draw.integer(0, outputs - 1)] *= draw.choice((0.0, 0.1, 100.0))
    bias = normal(draw, outputs, dtype=dtype, device=device) if draw.choice((True, False)) else None
    x = within(draw, rows, inputs, more=(0, 3), dtype=dtype, device=device)
    codes, scales = quantise(weight, bits, group)
    each = inputs if bits == 8 else group
    meant = codes.double() * scales.double().repeat_interleave(each, 1)[:, :inputs]
    _codes_are_near(weight.double(), meant, scales.double().abs().repeat_interleave(each, 1)[:, :inputs], bits)
    close(dequantise(codes, scales, group), meant)
    y = QuantisedLinear(weight, bias, bits=bits, group=group)(x)
    added = 0 if bias is None else bias.double()
    size = (x.double().square() @ meant.square().T).sqrt() + (0 if bias is None else added.abs())
    close(y, x.double() @ meant.T + added, size)


def _codes_are_near(weight: torch.Tensor, meant: torch.Tensor, scales: torch.Tensor, bits: int) -> None:
    """By half a step; of 4 bits by a whole one, where the number farthest from 0 has the other sign."""
    steps = 0.51 if bits == 8 else 1.1
    assert bool(((weight - meant).abs() <= steps * scales + 1e-30).all())
