"""Convolutions that remember."""

import torch

from bestiary_kernels import causal_conv
from bestiary_kernels.activation.reference import ACTIVATIONS

from .draw import DTYPES, Draw, case, close, normal
from .states import Sequences, strided


@case
def causal_convolution(draw: Draw, device: torch.device) -> None:
    """Ragged steps of sequences old and new, shorter than what is remembered or longer than is held, or of no token."""
    dtype, kept_dtype = draw.choice(DTYPES), draw.choice(DTYPES)
    channels, taps = draw.choice((1, 16, 64, draw.integer(1, 150))), draw.choice((4, 4, 3, 2, 1, 6))
    sequences = Sequences.drawn(draw, (channels, taps - 1), kept_dtype, device, longest=70)
    x = strided(draw, sequences.tokens, channels, dtype=dtype, device=device)
    weight = normal(draw, channels, 1, taps, dtype=dtype, device=device)[:, 0]
    bias = normal(draw, channels, dtype=dtype, device=device) if draw.choice((True, False)) else None
    act = draw.choice(("silu", "silu", None, *ACTIVATIONS))
    y = causal_conv(x, weight, bias, *sequences.arguments(), act)
    wanted, scales, kept = [torch.zeros(0, channels, dtype=torch.float64, device=device)], [], []
    for i, span in enumerate(sequences.spans()):
        inputs = torch.cat([sequences.start(i).T, x[span].double()])
        kept.append(inputs[len(inputs) - taps + 1 :].T)
        for t in range(len(inputs) - taps + 1):
            terms = inputs[t : t + taps] * weight.double().T
            total = terms.sum(0) if bias is None else terms.sum(0) + bias.double()
            wanted.append((total if act is None else ACTIVATIONS[act](total))[None])
            scales.append((terms.abs().sum(0) * (2 + total.abs() if act == "relu2" else 2))[None])
    close(y, torch.cat(wanted), torch.cat(scales) if scales else None)
    sequences.check(kept)
