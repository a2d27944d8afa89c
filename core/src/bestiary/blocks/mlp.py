"""Feed-forward blocks."""

from typing import Literal

from torch import Tensor

from bestiary.batch import Batch
from bestiary.blocks.leaf import Block
from bestiary.blocks.linear import Linear
from bestiary.parallel import Mesh

__all__ = ["MLP", "Activation", "Gate", "GatedMLP"]

Gate = Literal["silu", "gelu", "gelu_tanh", "relu"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu"]


class GatedMLP(Block):
    """down(act(gate(x)) x up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int, *, act: Gate = "silu", bias: bool = False) -> None:
        super().__init__()
        self.act = act
        self.gate_up = Linear(width, {"gate": inner, "up": inner}, "column", bias=bias)
        self.down = Linear(inner, width, "row", bias=bias)

    def cut(self, mesh: Mesh) -> None:
        """Some of the inner numbers."""
        inner = mesh.share(self.down.inputs)
        self.gate_up.keep_rows(gate=inner, up=inner)
        self.down.keep_addends(inner, mesh)

    def forward(self, x_TD: Tensor, batch: Batch) -> Tensor:
        """[T, width] to [T, width]."""
        return self.down(self.gate_up.activated(x_TD, self.act, gated=True))


class MLP(Block):
    """down(act(up(x))) (Vaswani et al. 2017, arXiv 1706.03762)."""

    def __init__(self, width: int, inner: int, *, act: Activation, bias: bool = True) -> None:
        super().__init__()
        self.act = act
        self.up = Linear(width, inner, "column", bias=bias)
        self.down = Linear(inner, width, "row", bias=bias)

    def cut(self, mesh: Mesh) -> None:
        """Some of the inner numbers."""
        inner = mesh.share(self.down.inputs)
        self.up.keep_rows(out=inner)
        self.down.keep_addends(inner, mesh)

    def forward(self, x_TD: Tensor, batch: Batch) -> Tensor:
        """[T, width] to [T, width]."""
        return self.down(self.up.activated(x_TD, self.act))
