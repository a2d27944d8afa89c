"""A matrix of every expert in twelve bits, exactly, and mixtures of such experts. Knows no router."""

from __future__ import annotations

from struct import Struct
from typing import Any

import torch
from torch import Tensor

from bestiary_kernels import library
from bestiary_kernels.activation import gated_activation
from bestiary_kernels.linear import PackedLinear
from bestiary_kernels.linear.reference import COLUMNS
from bestiary_kernels.moe import reference
from bestiary_kernels.moe.mix import mixed

__all__ = ["SqueezedExperts"]

_CALL = Struct("6q")  # ExpertsCall in linear.cpp


class SqueezedExperts:
    """What a weight [E, N, K] of bfloat16 says, each expert's matrix as `PackedLinear` squeezes it."""

    def __init__(self, experts: list[PackedLinear]) -> None:
        self._experts = experts
        self.shape = torch.Size((len(experts), experts[0].outputs, experts[0].inputs))
        self.dtype = experts[0].dtype
        # A SqueezedCall of every expert.
        self._calls = b"".join(expert.call for expert in experts)

    @classmethod
    def of(cls, *weights_ENK: Tensor) -> list[SqueezedExperts] | None:
        """The same matrices in twelve bits; None where any of them is not worth it, or has no kernel here."""
        made: list[SqueezedExperts] = []
        for weight_ENK in weights_ENK:
            experts = cls._of(weight_ENK)
            if experts is None:
                return None
            made.append(experts)
        return made

    @classmethod
    def _of(cls, weight_ENK: Tensor) -> SqueezedExperts | None:
        if weight_ENK.dtype is not torch.bfloat16 or not weight_ENK.is_cpu or not len(weight_ENK):
            return None
        experts: list[PackedLinear] = []
        for matrix_NK in weight_ENK:
            experts.append(PackedLinear(matrix_NK))
            if experts[-1].form != "squeezed":
                return None
        return cls(experts)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that all of them take."""
        return sum(expert.nbytes for expert in self._experts)

    def __call__(self, x: Tensor, experts_Tk: Tensor) -> Tensor:
        """As `experts_linear` of the weight. Raises ValueError and IndexError as that does."""
        (experts, outputs, inputs), (tokens, top_k) = self.shape, experts_Tk.shape
        if x.shape not in ((tokens, inputs), (tokens, top_k, inputs)) or x.dtype is not self.dtype:
            raise ValueError("experts_linear: the shapes or dtypes of x, weight and experts do not fit")
        multiply = self._kernel("experts_squeezed", x, experts_Tk)
        y = x.new_empty((tokens, top_k, outputs))
        if library.is_traced(x):
            return y
        if multiply is None:
            choices = y.flatten(0, 1)
            for expert, places in reference.by_expert(experts_Tk, experts):
                rows = x[places // top_k] if x.dim() == 2 else x.flatten(0, 1)[places]
                choices[places] = self._experts[expert](rows)
            return y
        each, stride = (top_k, x.stride(0)) if x.dim() == 2 else (1, inputs)
        call = _CALL.pack(experts_Tk.numel(), each, experts, inputs, outputs, stride)
        failed = multiply(x.data_ptr(), self._calls, experts_Tk.data_ptr(), y.data_ptr(), call)
        if failed:
            library.fail("experts_linear", failed)
        return y

    def mixture(self, x_TD: Tensor, down: SqueezedExperts, weights_Tk: Tensor, experts_Tk: Tensor, act: str) -> Tensor:
        """As `moe`, which has looked at shapes and dtypes, with these as the matrices of gate and up."""
        experts, inner_twice, _ = self.shape
        mix = self._kernel("moe_squeezed", x_TD, experts_Tk) if inner_twice % (2 * COLUMNS) == 0 else None
        if mix is None or weights_Tk.dtype is not torch.float32 or not weights_Tk.is_contiguous():
            both_TkI = self(x_TD, experts_Tk)
            hidden_TkI = gated_activation(both_TkI.flatten(0, 1), act).view(*experts_Tk.shape, inner_twice // 2)
            return (down(hidden_TkI, experts_Tk).float() * weights_Tk[..., None]).sum(1).to(x_TD.dtype)
        return mixed(mix, act, x_TD, self._calls, down._calls, weights_Tk, experts_Tk, experts, inner_twice // 2)

    def _kernel(self, name: str, x: Tensor, experts_Tk: Tensor) -> Any:
        """Our function of that name, if there is one for this layout."""
        kernels = library.native(x)
        fits = x.stride(-1) == 1 if x.dim() == 2 else x.is_contiguous()
        fits = fits and experts_Tk.is_contiguous() and experts_Tk.dtype is torch.int64
        return getattr(kernels, name) if kernels is not None and fits else None
