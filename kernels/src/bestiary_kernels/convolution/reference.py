"""Causal convolution in torch: the meaning of `causal_conv`."""

import torch
from torch import Tensor

from bestiary_kernels.activation.reference import ACTIVATIONS
from bestiary_kernels.states import load, spans, store

__all__ = ["causal_conv"]


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    query_starts: Tensor,
    fresh: Tensor,
    act: str | None,
) -> Tensor:
    """Return [T, C] and write the sequences' last inputs; see `bestiary_kernels.causal_conv`."""
    starts, lengths = spans("causal_conv", query_starts, len(x))
    before = load("causal_conv", states, read_slots, write_slots, fresh)
    sequences, channels, memory = before.shape
    # One table of all inputs: what each sequence kept, then what each brings.
    inputs = torch.cat([before.transpose(1, 2).reshape(-1, channels), x.float()])

    def row(sequence: Tensor, place: Tensor) -> Tensor:
        """Where in the table an input is, by its place in the sequence's step; what was kept has negative places."""
        new = sequences * memory + starts[sequence] + place
        return torch.where(place < 0, (sequence + 1) * memory + place, new)

    every = torch.arange(sequences, device=x.device)
    sequence = every.repeat_interleave(lengths)
    place = torch.arange(len(x), device=x.device) - starts[sequence]
    y = x.new_zeros(x.shape, dtype=torch.float32) if bias is None else bias.float().expand(x.shape)
    for tap in range(memory + 1):
        y = y + weight[:, tap].float() * inputs[row(sequence, place - memory + tap)]
    last = lengths[:, None] + torch.arange(-memory, 0, device=x.device)
    store(states, write_slots, inputs[row(every[:, None], last)].transpose(1, 2))
    return (y if act is None else ACTIVATIONS[act](y)).to(x.dtype)
