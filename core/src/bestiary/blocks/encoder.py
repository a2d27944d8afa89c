"""What encoders of pictures and sound are made of: each token of an item sees all of it, and nothing is kept.

Knows no model and no modality. Rows of several items lie one after the other, and those of one never see another's.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

import bestiary_kernels as kernels
from bestiary.blocks.leaf import Block
from bestiary.blocks.linear import Linear
from bestiary.blocks.norm import Norm
from bestiary.checkpoint import Place
from bestiary.errors import TensorMismatch
from bestiary.parallel import Mesh, scaled

__all__ = ["Convolution1d", "EncoderAttention", "EncoderLayer", "Items", "PatchEmbedding", "patches"]


@dataclass(frozen=True, eq=False)
class Items:
    """Which rows belong together: the first `lengths[0]` are one item, the next `lengths[1]` another."""

    lengths: tuple[int, ...]
    #: Cosines and sines by which each row's queries and keys turn, [T, 2, turned numbers of a head / 2] float32.
    angles: Tensor | None = None
    #: For each item, to be spread over [heads, queries, keys]: whether a key is seen, or what is added to its score.
    masks: tuple[Tensor, ...] | None = None


class _Projections(Linear):
    """Queries, keys and values in one product; a part that has no bias in the checkpoint has one of zeros here."""

    def __init__(self, width: int, parts: dict[str, int], unit: int, biases: Collection[str]) -> None:
        super().__init__(width, parts, "column", unit=unit, bias=bool(biases))
        self.biases = biases

    def expected(self) -> Iterator[Place]:
        """The weights, and the biases that there are."""
        return (place for place in super().expected() if place[1] != "bias" or place[0] in self.biases)

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """Make the tensors, the biases zero."""
        super().allocate(dtype, device)
        if self.has_bias:
            self.bias.zero_()


class EncoderAttention(Block):
    """Attention both ways within each item (Vaswani et al. 2017, arXiv 1706.03762).

    `biases`: which of q, k and v have one. `interleaved`: neighbours turn against each other, not halves of a head.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        head_dim: int | None = None,
        biases: Collection[str] = ("q", "k", "v"),
        out_bias: bool = True,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim or width // heads
        self.interleaved = interleaved
        inner = heads * self.head_dim
        self.qkv = _Projections(width, {"q": inner, "k": inner, "v": inner}, self.head_dim, biases)
        self.out = Linear(inner, width, "row", bias=out_bias)

    def cut(self, mesh: Mesh) -> None:
        """Some of the heads, where they can be shared out evenly; else all of them on every shard."""
        if self.heads % mesh.shards == 0:
            own = mesh.share(self.heads)
            rows = scaled(own, self.head_dim)
            self.qkv.keep_rows(q=rows, k=rows, v=rows)
            self.out.keep_addends(rows, mesh)
            self.heads = len(own)

    def forward(self, x_TD: Tensor, items: Items) -> Tensor:
        """[T, width] to [T, width]."""
        q, k, v = self.qkv(x_TD).view(x_TD.shape[0], 3, self.heads, self.head_dim).unbind(1)
        if items.angles is not None:
            rows = torch.arange(x_TD.shape[0], device=x_TD.device)
            q, k = (kernels.rotary(part, items.angles, rows, self.interleaved) for part in (q, k))
        # One call for each item: padding to a common length would cost its square.
        pieces = zip(*(part.transpose(0, 1).split_with_sizes(items.lengths, 1) for part in (q, k, v)), strict=True)
        masks = items.masks or (None,) * len(items.lengths)
        mixed = [
            F.scaled_dot_product_attention(q[None], k[None], v[None], None if mask is None else mask[None])[0]
            for (q, k, v), mask in zip(pieces, masks, strict=True)
        ]
        return self.out(torch.cat(mixed, 1).transpose(0, 1).reshape(x_TD.shape[0], -1))


class EncoderLayer(Block):
    """Norm, mix, add; norm, feed forward, add. Between layers the stream is whole, so that it can be read there."""

    def __init__(self, *, mix_norm: Norm, mixer: Block, ffn_norm: Norm, ffn: Block) -> None:
        super().__init__()
        self.mix_norm, self.mixer, self.ffn_norm, self.ffn = mix_norm, mixer, ffn_norm, ffn

    def forward(self, x_TD: Tensor, items: Items) -> Tensor:
        """[T, width] to [T, width], in memory of its own."""
        mixed_TD = self.mixer(self.mix_norm(x_TD)[0], items)
        # The norm may use up the memory of its second addend: that must not be the stream, which others may hold.
        normed_TD, x_TD = self.ffn_norm(x_TD, mixed_TD)
        y_TD: Tensor = x_TD + self.ffn(normed_TD, items)
        return y_TD


class _Convolution(Linear):
    """A convolution as a product with windows that are laid out in rows; `kernel` is the shape of one window."""

    takes_adapters = False

    def __init__(self, kernel: tuple[int, ...], width: int, *, bias: bool) -> None:
        super().__init__(prod(kernel), width, "whole", bias=bias)
        self.kernel = kernel

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """Make the tensors; what comes in later is rounded to their dtype."""
        super().allocate(dtype, device)
        self.dtype = dtype

    def fill(self, part: str | None, suffix: str, tensor: Tensor, index: int | None) -> None:
        """Copy in; a weight [width, *kernel], or with its windows flat."""
        if suffix == "weight" and tensor.ndim != 2:
            if tuple(tensor.shape[1:]) != self.kernel:
                raise TensorMismatch(
                    f"shape {tuple(tensor.shape)}, and the model needs {(*tensor.shape[:1], *self.kernel)}"
                )
            tensor = tensor.flatten(1)
        super().fill(part, suffix, tensor, index)


class PatchEmbedding(_Convolution):
    """Patches of a picture, or of `frames` pictures, to vectors (Dosovitskiy et al. 2020, arXiv 2010.11929)."""

    def __init__(self, channels: int, size: int, width: int, *, frames: int | None = None, bias: bool = False) -> None:
        super().__init__((channels, *(() if frames is None else (frames,)), size, size), width, bias=bias)

    def __call__(self, patches_TP: Tensor) -> Tensor:
        """[T, numbers of a patch] of any float dtype to [T, width]."""
        return self.forward(patches_TP.to(self.dtype))


class Convolution1d(_Convolution):
    """A convolution over time, with zeros before the beginning and after the end."""

    def __init__(
        self, channels: int, width: int, *, taps: int, stride: int = 1, padding: int = 0, bias: bool = True
    ) -> None:
        super().__init__((channels, taps), width, bias=bias)
        self.taps, self.stride, self.padding = taps, stride, padding

    def __call__(self, x_CF: Tensor) -> Tensor:
        """[channels, frames] of any float dtype to [width, fewer frames]."""
        windows_CFK = F.pad(x_CF.to(self.dtype), (self.padding,) * 2).unfold(1, self.taps, self.stride)
        return self.forward(windows_CFK.transpose(0, 1).flatten(1)).T


def patches(pixels_NCHW: Tensor, size: int) -> Tensor:
    """[N x rows x columns, C x size x size] of pictures, row by row; what is left at the right and below is cut off."""
    n, c, height, width = pixels_NCHW.shape
    rows, columns = height // size, width // size
    whole = pixels_NCHW[:, :, : rows * size, : columns * size]
    return whole.reshape(n, c, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5).reshape(n * rows * columns, -1)
