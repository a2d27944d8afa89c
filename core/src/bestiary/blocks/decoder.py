"""The trunk of a decoder: embedding, a stack of layers, a last norm and the head. Knows no architecture.

The residual stream travels as two addends, (x, residual), so that each norm can add and normalise in one pass.
"""

from collections.abc import Callable

from torch import Tensor, nn

from bestiary.batch import Batch
from bestiary.blocks.leaf import Block
from bestiary.blocks.linear import Embedding, Linear
from bestiary.blocks.norm import RMSNorm

__all__ = ["Decoder", "Head", "Layer", "Layers"]


class Layer(Block):
    """Norm, mix, add; norm, feed forward, add."""

    def __init__(self, *, mix_norm: RMSNorm, mixer: Block, ffn_norm: RMSNorm, ffn: Block) -> None:
        super().__init__()
        self.mix_norm, self.mixer, self.ffn_norm, self.ffn = mix_norm, mixer, ffn_norm, ffn

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        """The stream's two addends to those of the next layer."""
        x_TD, residual_TD = self.mix_norm(x_TD, residual_TD)
        x_TD, residual_TD = self.ffn_norm(self.mixer(x_TD, batch), residual_TD)
        return self.ffn(x_TD, batch), residual_TD


class Layers(nn.ModuleDict):
    """The layers of this rank under their numbers in the whole model."""

    def __init__(self, count: int, layer: Callable[[int], Block]) -> None:
        super().__init__({str(i): layer(i) for i in range(count)})
        self.count = count

    def keep(self, kept: range) -> None:
        """Drop the layers that other ranks run."""
        for i in range(self.count):
            if i not in kept:
                del self[str(i)]


class Head(Linear):
    """Hidden states to logits; `tied` reads the embedding's table instead of a matrix of its own."""

    def __init__(self, vocabulary: int, width: int, *, tied: bool = False, bias: bool = False) -> None:
        super().__init__(width, vocabulary, "column", bias=bias)
        self.tied = tied

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """No weight when tied."""
        return {k: shape for k, shape in super().shapes().items() if not (self.tied and k == "weight")}

    def fill(self, part: str | None, suffix: str, tensor: Tensor, index: int | None) -> None:
        """Some checkpoints store a tied table twice; the second copy says nothing new."""
        if not (self.tied and suffix == "weight"):
            super().fill(part, suffix, tensor, index)

    def pack(self, *, keep_rows: bool = False) -> None:
        """A tied table is read by the embedding too."""
        super().pack(keep_rows=keep_rows or self.tied)


class Decoder(Block):
    """Token ids in, logits out; on a rank of a pipeline, hidden states in or out."""

    def __init__(self, *, embed: Embedding, layers: Layers, norm: RMSNorm, head: Head, context: int) -> None:
        super().__init__()
        self.embed, self.layers, self.norm, self.head = embed, layers, norm, head
        #: Tokens that the model was made to see at once.
        self.context = context
        self.is_first = self.is_last = True
        self.stack: tuple[nn.Module, ...] = ()

    def settle(self) -> None:
        """Freeze the stack into a tuple."""
        super().settle()
        self.stack = tuple(self.layers.values())

    def forward(self, batch: Batch, x_TD: Tensor | None = None) -> Tensor:
        """[R, width] normalised states of the wanted rows; the bare stream [T, width] where another stage follows.

        `x_TD` is the stream that the stage before sent; the first stage embeds the tokens instead.
        """
        stream: Tensor = self.embed(batch.token_ids) if x_TD is None else x_TD
        residual: Tensor | None = None
        for layer in self.stack:
            stream, residual = layer(stream, residual, batch)
        if not self.is_last:
            return stream if residual is None else stream + residual
        if batch.output_rows is not None:
            stream = stream[batch.output_rows]
            residual = None if residual is None else residual[batch.output_rows]
        hidden: Tensor = self.norm(stream, residual)[0]
        return hidden

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, width] to [R, vocabulary]."""
        logits_RV: Tensor = self.head(hidden_RD)
        return logits_RV
