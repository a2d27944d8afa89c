"""A mixture of experts (Shazeer et al. 2017, arXiv 1701.06538): a router sends each token to a few of many MLPs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import bestiary_kernels as kernels
from bestiary.batch import Batch
from bestiary.blocks.leaf import Block, Leaf
from bestiary.blocks.linear import Linear
from bestiary.blocks.lowrank import Adaptable
from bestiary.blocks.mlp import Gate, GatedMLP
from bestiary.checkpoint import Place
from bestiary.parallel import Mesh

__all__ = ["Experts", "MoE", "Routing"]


@dataclass(frozen=True)
class Routing:
    """How experts are chosen and weighed: what `bestiary_kernels.route` takes by these names.

    `bias`: a number of each expert helps to decide who is chosen, and not how much it counts.
    """

    top_k: int
    renormalise: bool
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    softmax_last: bool = False
    scoring: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    group_by: Literal["best", "best_two"] = "best"
    jitter: float = 0.0
    bias: bool = False


class Experts(Adaptable):
    """One matrix of every expert, stacked: [experts, outputs, inputs]."""

    weight: nn.Parameter

    def __init__(self, count: int, inputs: int, outputs: dict[str, int]) -> None:
        super().__init__()
        self.stack, self.inputs, self.parts = count, inputs, outputs
        #: In place of the weight, where it is squeezed.
        self.squeezed: kernels.SqueezedExperts | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A weight [experts, outputs, inputs]."""
        return {"weight": (self.stack, sum(self.parts.values()), self.inputs)}

    def expected(self) -> Iterator[Place]:
        """Every part of every expert."""
        for index in range(self.stack):
            for part in self.parts:
                yield part, "weight", index

    def bytes_read(self, dtype: torch.dtype) -> int:
        """What it would be of squeezed ones; `MoE` knows whether they are."""
        experts, outputs, inputs = self.held()["weight"]
        return experts * kernels.PackedLinear.bytes_read(outputs, inputs, dtype)

    @property
    def matrices(self) -> Tensor | kernels.SqueezedExperts:
        """What the kernels take."""
        return self.weight if self.squeezed is None else self.squeezed

    @staticmethod
    def squeeze(*stacks: "Experts") -> None:
        """Hold them in fewer bits and free the weights: all of them, since their kernels go together, or none."""
        made = kernels.SqueezedExperts.of(*(stack.weight.data for stack in stacks))
        if made is None:
            return
        for stack, squeezed in zip(stacks, made, strict=True):
            stack.squeezed = squeezed
            del stack.weight

    def forward(self, x: Tensor, experts_Tk: Tensor, slots_T: Tensor) -> Tensor:
        """[T, k, outputs] of each token's experts with its adapter, from [T, inputs] or [T, k, inputs]."""
        y_TkN = kernels.experts_linear(x, self.matrices, experts_Tk)
        if self.low is not None:
            rows_TkK = x if x.dim() == 3 else x[:, None].expand(*experts_Tk.shape, -1)
            own_Tk = torch.where(slots_T[:, None] < 0, -1, slots_T[:, None] * self.stack + experts_Tk)
            self.low.add(y_TkN.flatten(0, 1), rows_TkK.flatten(0, 1), own_Tk.flatten().int())
        return y_TkN


class _Bias(Leaf):
    """A number of each expert, of float32 in every model: it decides between scores that are nearly equal."""

    bias: nn.Parameter

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.parts = {"out": experts}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """A bias [experts]."""
        return {"bias": (self.parts["out"],)}

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """Make it, unfilled."""
        super().allocate(torch.float32, device)


class MoE(Block):
    """The chosen experts' gated MLPs, weighed and added; perhaps with one that every token goes through.

    `shared` is the width of that one, 0 for none; with `shared_gate` a sigmoid of the token decides how much it counts.
    """

    def __init__(
        self,
        width: int,
        inner: int,
        experts: int,
        routing: Routing,
        *,
        act: Gate = "silu",
        shared: int = 0,
        shared_gate: bool = False,
    ) -> None:
        super().__init__()
        self.routing, self.act = routing, act
        self.router = Linear(width, experts, "whole", exact=True)
        self.router_bias = _Bias(experts) if routing.bias else None
        self.gate_up = Experts(experts, width, {"gate": inner, "up": inner})
        self.down = Experts(experts, inner, {"out": width})
        self.shared = GatedMLP(width, shared, act=act) if shared else None
        self.shared_gate = Linear(width, 1, "whole", exact=True) if shared_gate else None
        self.add: Callable[[Tensor], Tensor] | None = None

    def cut(self, mesh: Mesh) -> None:
        """Some of the inner numbers of every expert."""
        inner = mesh.share(self.down.inputs)
        self.gate_up.keep_rows(gate=inner, up=inner)
        self.down.keep_columns(inner)
        self.add = mesh.link.all_reduce

    def bytes_read(self, dtype: torch.dtype) -> int:
        """Of all experts; they are of no other use afterwards. Both stacks are squeezed, or neither."""
        sizes = [(stack.nbytes(dtype), stack.bytes_read(dtype)) for stack in (self.gate_up, self.down)]
        are_squeezed = all(squeezed < plain for plain, squeezed in sizes)
        return sum(squeezed if are_squeezed else plain for plain, squeezed in sizes)

    def settle(self) -> None:
        """Squeeze the experts where that is worth it."""
        Experts.squeeze(self.gate_up, self.down)
        super().settle()

    def forward(self, x_TD: Tensor, batch: Batch) -> Tensor:
        """[T, width] to [T, width]."""
        to = self.routing
        weights_Tk, experts_Tk = kernels.route(
            self.router(x_TD),
            to.top_k,
            renormalise=to.renormalise,
            scale=to.scale,
            groups=to.groups,
            top_groups=to.top_groups,
            softmax_last=to.softmax_last,
            scoring=to.scoring,
            bias_E=None if self.router_bias is None else self.router_bias.bias,
            group_by=to.group_by,
            jitter=to.jitter,
        )
        y_TD = self._mixed(x_TD, weights_Tk, experts_Tk)
        if self.add is not None:
            y_TD = self.add(y_TD)
        if self.shared is None:
            return y_TD
        gate_T1 = None if self.shared_gate is None else self.shared_gate(x_TD)
        return kernels.add(y_TD, self.shared(x_TD, batch), gate_T1)

    def _mixed(self, x_TD: Tensor, weights_Tk: Tensor, experts_Tk: Tensor) -> Tensor:
        """[T, width] what the chosen experts make of each token, weighed and added."""
        slots_T = self.gate_up.slots_of(x_TD) if self.gate_up.low else self.down.slots_of(x_TD)
        if slots_T is None:
            return kernels.moe(x_TD, self.gate_up.matrices, self.down.matrices, weights_Tk, experts_Tk, self.act)
        both_TkI = self.gate_up(x_TD, experts_Tk, slots_T)
        inner_TkI = kernels.gated_activation(both_TkI.flatten(0, 1), self.act).view(*experts_Tk.shape, -1)
        said_TkD: Tensor = self.down(inner_TkI, experts_Tk, slots_T)
        return (said_TkD.float() * weights_Tk[..., None]).sum(1).to(x_TD.dtype)
