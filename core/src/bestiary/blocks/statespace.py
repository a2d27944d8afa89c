"""Selective state spaces (Gu and Dao 2023, arXiv 2312.00752): a state of fixed size instead of keys and values."""

import torch
from torch import Tensor, nn

import bestiary_kernels as kernels
from bestiary.batch import Batch
from bestiary.blocks.kept import State
from bestiary.blocks.leaf import Leaf, Learned
from bestiary.blocks.linear import Linear
from bestiary.blocks.mixer import Mixer
from bestiary.blocks.norm import RMSNorm
from bestiary.parallel import Mesh

__all__ = ["Mamba"]


class _Convolution(Leaf):
    """A filter over the last `taps` tokens for each channel."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, channels: int, taps: int, *, bias: bool) -> None:
        super().__init__()
        self.channels, self.taps, self.has_bias = channels, taps, bias
        self.parts = {"out": channels}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A weight [channels, 1, taps] and perhaps a bias [channels]."""
        weight = {"weight": (self.channels, 1, self.taps)}
        return {**weight, "bias": (self.channels,)} if self.has_bias else {**weight}


class _Exact(Learned):
    """One that stays in float32 whatever the model's dtype, since it acts on a state over and over."""

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """Make it, in float32."""
        super().allocate(torch.float32, device)


class _Decay(_Exact):
    """What a checkpoint has the logarithm of: how quickly each number of a state fades, below 0."""

    def pack(self) -> None:
        """The number itself, once."""
        self.weight.data = -torch.exp(self.weight.data)


def _kept(channels: int, taps: int, state: int) -> State:
    return State(shapes=((channels, taps - 1), (channels, state)), exact=(False, True))


class Mamba(Mixer):
    """The mixer of Mamba: x and z in, convolve x, scan it with steps, inputs and outputs read off x itself, gate by z.

    `norm_eps`: steps, inputs and outputs are normalised first (Lieber et al. 2024, arXiv 2403.19887).
    """

    def __init__(
        self,
        width: int,
        *,
        inner: int,
        state: int,
        taps: int,
        step_rank: int,
        bias: bool = False,
        conv_bias: bool = True,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.sizes = (step_rank, state, state)
        self.taps, self.keeps = taps, _kept(inner, taps, state)
        self.into = Linear(width, {"x": inner, "z": inner}, "column", bias=bias)
        self.conv = _Convolution(inner, taps, bias=conv_bias)
        self.select = Linear(inner, sum(self.sizes), "row")
        self.step = Linear(step_rank, inner, "column", bias=True)
        self.decay, self.skip = _Decay(inner, state), _Exact(inner)
        self.out = Linear(inner, width, "row", bias=bias)
        self.step_norm, self.input_norm, self.output_norm = (
            None if norm_eps is None else RMSNorm(size, norm_eps) for size in self.sizes
        )

    def cut(self, mesh: Mesh) -> None:
        """Some of the channels; steps, inputs and outputs are read off all of them."""
        own = mesh.share(self.out.inputs)
        self.into.keep_rows(x=own, z=own)
        for leaf in (self.conv, self.step, self.decay, self.skip):
            leaf.keep_rows(out=own)
        self.select.keep_addends(own, mesh)
        self.out.keep_addends(own, mesh)
        self.keeps = _kept(len(own), self.taps, self.sizes[1])

    def forward(self, x_TD: Tensor, batch: Batch) -> Tensor:
        """[T, width] to [T, width]; the sequences' states move on."""
        columns, state = batch.caches[self.slot]
        slots = batch.states[self.group]
        xz = self.into(x_TD)
        x_TC, z_TC = xz.split_with_sizes((xz.shape[1] // 2,) * 2, -1)
        x_TC = kernels.causal_conv(
            x_TC,
            self.conv.weight[:, 0],
            self.conv.bias if self.conv.has_bias else None,
            columns,
            slots.read,
            slots.write,
            batch.query_starts,
            slots.fresh,
            "silu",
        )
        step_TC, input_TN, output_TN = self._selected(x_TC)
        y_TC = kernels.selective_scan(
            x_TC,
            step_TC,
            self.decay.weight,
            input_TN,
            output_TN,
            self.skip.weight,
            state,
            slots.read,
            slots.write,
            batch.query_starts,
            slots.fresh,
            z_TC,
            softplus=True,
        )
        return self.out(y_TC)

    def _selected(self, x_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, inner] each channel's step before its softplus; [T, state] what enters the state, and what is read."""
        found = self.select(x_TC).split_with_sizes(self.sizes, -1)
        norms = (self.step_norm, self.input_norm, self.output_norm)
        step_TR, input_TN, output_TN = (
            part if norm is None else norm(part)[0] for part, norm in zip(found, norms, strict=True)
        )
        return self.step(step_TR), input_TN, output_TN
