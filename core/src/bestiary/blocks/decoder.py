"""The trunk of a decoder: embedding, a stack of layers, a last norm and the head. Knows no architecture."""

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bestiary_kernels as kernels
from bestiary.batch import Batch
from bestiary.blocks.leaf import Block
from bestiary.blocks.linear import Embedding, Linear
from bestiary.blocks.norm import Norm
from bestiary.blocks.pooling import Pooler
from bestiary.parallel import Mesh

__all__ = ["Decoder", "Encoder", "Head", "Layers"]

_NOT_TIED = "the stored head differs from the table it is tied to, and is not used (config.json: tie_word_embeddings)"
#: Rows of two tables that are compared at a time.
_COMPARED = 4096


class Encoder(Block):
    """What makes vectors of a prompt's items; a model's own derives from it."""

    def forward(self, modality: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """[vectors, width] of one item of the modality."""
        raise NotImplementedError(type(self).__name__)


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
    """Hidden states to logits; `tied` reads the embedding's table instead of a matrix of its own.

    `softcap` c keeps the logits within c: c tanh(logits / c). `unwritten` tokens after the others stand in prompts
    alone: the embedding has them, the head does not.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        *,
        tied: bool = False,
        bias: bool = False,
        softcap: float | None = None,
        unwritten: int = 0,
    ) -> None:
        super().__init__(width, vocabulary, "column", bias=bias)
        self.tied, self.softcap, self.unwritten = tied, softcap, unwritten
        self.vocabulary, self.over = vocabulary, "outputs"
        #: This shard's rows of a tied table's second copy, as the checkpoint has them.
        self._copy: Tensor | None = None

    def keep_tokens(self, mesh: Mesh) -> None:
        """This shard makes the logits of some of the tokens; the first one puts all shards' together."""
        shares = mesh.shares(self.vocabulary)
        self.keep_rows(out=shares[mesh.shard])

        def whole(logits_RV: Tensor) -> Tensor:
            return torch.cat(
                mesh.link.gather(logits_RV, [(len(logits_RV), len(share)) for share in shares]) or [logits_RV], 1
            )

        self.add = whole

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """No weight when tied."""
        return {k: shape for k, shape in super().shapes().items() if not (self.tied and k == "weight")}

    def fill(self, part: str | None, suffix: str, tensor: Tensor, index: int | None) -> None:
        """Some checkpoints store a tied table twice; the second copy should say nothing new, which `pack` looks at."""
        if self.tied and suffix == "weight":
            self._copy = self.own(part or "out", suffix, tensor)
        else:
            super().fill(part, suffix, tensor, index)

    def pack(self, *, keep_rows: bool = False) -> None:
        """A tied table is read by the embedding too."""
        copy, self._copy = self._copy, None
        if copy is not None and not _are_alike(copy, self.weight):
            warnings.warn(_NOT_TIED, RuntimeWarning, stacklevel=2)
        super().pack(keep_rows=keep_rows or self.tied)


def _are_alike(copy: Tensor, table: Tensor) -> bool:
    """Whether the copy, rounded as the table was, is the same; a few rows at a time, as it may be large."""
    spans = (slice(at, at + _COMPARED) for at in range(0, len(table), _COMPARED))
    return copy.shape == table.shape and all(torch.equal(copy[span].to(table), table[span]) for span in spans)


class Decoder(Block):
    """Token ids in, logits out; on a rank of a pipeline, hidden states in or out.

    What enters the stack: embeddings, times `embed_scale`, plus learned `positions`, through `embed_norm`.
    """

    def __init__(
        self,
        *,
        embed: Embedding,
        layers: Layers,
        norm: Norm | None,
        head: Head | Pooler,
        context: int,
        embed_scale: float | None = None,
        positions: Embedding | None = None,
        embed_norm: Norm | None = None,
        encoder: Encoder | None = None,
    ) -> None:
        super().__init__()
        self.embed, self.layers, self.norm, self.head = embed, layers, norm, head
        self.embed_scale, self.positions, self.embed_norm = embed_scale, positions, embed_norm
        #: Makes vectors of what a prompt brings beside its tokens.
        self.encoder = encoder
        #: Tokens that the model was made to see at once.
        self.context = context
        self.is_first = self.is_last = True
        self.stack: tuple[nn.Module, ...] = ()

    def cut(self, mesh: Mesh) -> None:
        """Some of the vocabulary, on both ends."""
        if hasattr(self, "embed"):
            self.embed.keep_tokens(mesh)
        if self.is_last and isinstance(self.head, Head):
            self.head.keep_tokens(mesh)

    def settle(self) -> None:
        """Freeze the stack into a tuple."""
        super().settle()
        self.stack = tuple(self.layers.values())

    def forward(self, batch: Batch, x_TD: Tensor | None = None) -> Tensor:
        """[R, width] normalised states of the wanted rows; the bare stream [T, width] where another stage follows.

        `x_TD` is the stream that the stage before sent; the first stage embeds the tokens instead.
        """
        stream = self._embedded(batch) if x_TD is None else x_TD
        residual: Tensor | None = None
        for layer in self.stack:
            stream, residual = layer(stream, residual, batch)
        if not self.is_last:
            return stream if residual is None else stream + residual
        if batch.output_rows is not None:
            stream = stream[batch.output_rows]
            residual = None if residual is None else residual[batch.output_rows]
        if self.norm is None:
            return stream if residual is None else stream + residual
        hidden: Tensor = self.norm(stream, residual)[0]
        return hidden

    def _embedded(self, batch: Batch) -> Tensor:
        x_TD: Tensor = self.embed(batch.token_ids)
        if self.embed_scale is not None:
            # Rounded to the model's dtype first, as the models that have one were trained.
            x_TD = kernels.scaled(x_TD, self.embed_scale)
        if batch.vectors is not None:
            x_TD = x_TD.index_copy(0, batch.vectors.rows, batch.vectors.values.to(x_TD.dtype))
        if self.positions is not None:
            x_TD = kernels.add(x_TD, self.positions(batch.positions))
        return x_TD if self.embed_norm is None else self.embed_norm(x_TD)[0]

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, width] to [R, vocabulary], or to the vectors of a model that pools."""
        logits_RV: Tensor = self.head(hidden_RD)
        if self.head.softcap is not None:
            logits_RV = kernels.scaled(logits_RV, cap=self.head.softcap)
        if self.head.unwritten:
            logits_RV = F.pad(logits_RV, (0, self.head.unwritten), value=float("-inf"))
        return logits_RV
