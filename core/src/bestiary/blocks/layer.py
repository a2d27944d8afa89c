"""The ways in which a layer puts its mixer and its feed-forward together. Knows nothing of what is in them.

The residual stream travels as two addends, (x, residual), so that each norm can add and normalise in one pass.
"""

from torch import Tensor

import bestiary_kernels as kernels
from bestiary.batch import Batch
from bestiary.blocks.leaf import Block
from bestiary.blocks.norm import Norm

__all__ = ["Layer", "MixerLayer", "ParallelLayer", "PostNormLayer", "SandwichLayer"]

Stream = tuple[Tensor, Tensor | None]


class Layer(Block):
    """Norm, mix, add; norm, feed forward, add."""

    def __init__(self, *, mix_norm: Norm, mixer: Block, ffn_norm: Norm, ffn: Block) -> None:
        super().__init__()
        self.mix_norm, self.mixer, self.ffn_norm, self.ffn = mix_norm, mixer, ffn_norm, ffn

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None, batch: Batch) -> Stream:
        """The stream's two addends to those of the next layer."""
        x_TD, residual_TD = self.mix_norm(x_TD, residual_TD)
        x_TD, residual_TD = self.ffn_norm(self.mixer(x_TD, batch), residual_TD)
        return self.ffn(x_TD, batch), residual_TD


class MixerLayer(Block):
    """Norm, mix, add; and no feed-forward."""

    def __init__(self, *, mix_norm: Norm, mixer: Block) -> None:
        super().__init__()
        self.mix_norm, self.mixer = mix_norm, mixer

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None, batch: Batch) -> Stream:
        """The stream's two addends to those of the next layer."""
        x_TD, residual_TD = self.mix_norm(x_TD, residual_TD)
        return self.mixer(x_TD, batch), residual_TD


class SandwichLayer(Block):
    """As `Layer`, and what comes out of mixer and feed-forward is normalised too before it is added."""

    def __init__(
        self, *, mix_norm: Norm, mixer: Block, mix_post_norm: Norm, ffn_norm: Norm, ffn: Block, ffn_post_norm: Norm
    ) -> None:
        super().__init__()
        self.mix_norm, self.mixer, self.mix_post_norm = mix_norm, mixer, mix_post_norm
        self.ffn_norm, self.ffn, self.ffn_post_norm = ffn_norm, ffn, ffn_post_norm

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None, batch: Batch) -> Stream:
        """The stream's two addends to those of the next layer."""
        x_TD, residual_TD = self.mix_norm(x_TD, residual_TD)
        mixed_TD, _ = self.mix_post_norm(self.mixer(x_TD, batch))
        x_TD, residual_TD = self.ffn_norm(mixed_TD, residual_TD)
        y_TD, _ = self.ffn_post_norm(self.ffn(x_TD, batch))
        return y_TD, residual_TD


class ParallelLayer(Block):
    """Mixer and feed-forward read the same stream, each behind a norm of its own or both behind one, and are added."""

    def __init__(self, *, mix_norm: Norm, mixer: Block, ffn: Block, ffn_norm: Norm | None = None) -> None:
        super().__init__()
        self.mix_norm, self.mixer, self.ffn_norm, self.ffn = mix_norm, mixer, ffn_norm, ffn

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None, batch: Batch) -> Stream:
        """The stream's two addends to those of the next layer."""
        x_TD, residual_TD = self.mix_norm(x_TD, residual_TD)
        y_TD = x_TD if self.ffn_norm is None else self.ffn_norm(residual_TD)[0]
        return kernels.add(self.mixer(x_TD, batch), self.ffn(y_TD, batch)), residual_TD


class PostNormLayer(Block):
    """Mix, add, norm; perhaps look across, add, norm; feed forward, add, norm (Vaswani 2017, arXiv 1706.03762)."""

    def __init__(
        self,
        *,
        mixer: Block,
        mix_norm: Norm,
        ffn: Block,
        ffn_norm: Norm,
        cross: Block | None = None,
        cross_norm: Norm | None = None,
    ) -> None:
        super().__init__()
        self.mixer, self.mix_norm = mixer, mix_norm
        self.cross, self.cross_norm = cross, cross_norm
        self.ffn, self.ffn_norm = ffn, ffn_norm

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None, batch: Batch) -> Stream:
        """The stream, whole: there is nothing to add to what was normalised last."""
        x_TD = x_TD if residual_TD is None else x_TD + residual_TD
        x_TD = self.mix_norm(self.mixer(x_TD, batch), x_TD)[0]
        if self.cross is not None and self.cross_norm is not None:
            x_TD = self.cross_norm(self.cross(x_TD, batch), x_TD)[0]
        return self.ffn_norm(self.ffn(x_TD, batch), x_TD)[0], None
