"""What stands in the head's place where a model's answer is numbers instead of tokens."""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from bestiary.blocks.leaf import Block
from bestiary.blocks.linear import Linear
from bestiary.blocks.mlp import Activation

__all__ = ["Pooler", "Scores"]


class Scores(Block):
    """Hidden states to one number for each label, through an inner layer or without one."""

    def __init__(
        self, width: int, labels: int, *, inner: int | None = None, act: Activation = "relu", bias: bool = True
    ) -> None:
        super().__init__()
        self.act = act
        self.inner = None if inner is None else Linear(width, inner, "whole", bias=bias)
        self.out = Linear(inner or width, labels, "whole", bias=bias)
        for leaf in (self.inner, self.out):
            if leaf is not None:
                leaf.over = "outputs"

    def forward(self, hidden_RD: Tensor) -> Tensor:
        """[R, width] to [R, labels]."""
        if self.inner is not None:
            hidden_RD = self.inner.activated(hidden_RD, self.act)
        return self.out(hidden_RD)


class Pooler(Block):
    """Hidden states to vectors: of a prompt's last token, or of every token of it.

    `scores` makes numbers of hidden states, which are the vectors themselves without it; `normalise` gives each vector
    the length 1.
    """

    #: Unlike a head it shares no table with the embedding, and caps nothing.
    tied = False
    softcap: float | None = None
    unwritten: int = 0

    def __init__(
        self, *, tokens: Literal["last", "all"] = "last", scores: Scores | None = None, normalise: bool = False
    ) -> None:
        super().__init__()
        self.tokens, self.scores, self.normalise = tokens, scores, normalise

    def forward(self, hidden_RD: Tensor) -> Tensor:
        """[R, width] to [R, width], or [R, labels], float32."""
        found = (hidden_RD if self.scores is None else self.scores(hidden_RD)).float()
        return F.normalize(found, dim=-1) if self.normalise else found
