"""A matrix of each choice's expert times its row: the products of a mixture one by one, for what joins in between."""

from struct import Struct

import torch
from torch import Tensor

from bestiary_kernels import gpu, library
from bestiary_kernels.moe import reference
from bestiary_kernels.moe.squeezed import SqueezedExperts

__all__ = ["are_few", "experts_linear"]

_CALL = Struct("6q")  # ExpertsCall in linear.cpp
#: Up to so many tokens for each expert ours are faster than torch's products, one expert after the other (measured with
#: 768 x 1536 and 1024 x 512); without dot products of bfloat16 up to fewer.
_MOST_TOKENS, _MOST_TOKENS_WITHOUT = 128, 24


def experts_linear(x: Tensor, weight_ENK: Tensor | SqueezedExperts, experts_Tk: Tensor) -> Tensor:
    """Return [T, k, N]: for each of a token's choices the chosen expert's matrix times its row, rounded once.

    x is [T, K], a row for all choices of a token, or [T, k, K], a row for each, in the weight's dtype. Raises
    ValueError for shapes or dtypes that do not fit, IndexError for an expert outside the weights; on a GPU its numbers
    are undefined.
    """
    if isinstance(weight_ENK, SqueezedExperts):
        return weight_ENK(x, experts_Tk)
    (tokens, top_k), (experts, outputs, inputs) = experts_Tk.shape, weight_ENK.shape
    if x.shape not in ((tokens, inputs), (tokens, top_k, inputs)) or x.dtype is not weight_ENK.dtype:
        raise ValueError("experts_linear: the shapes or dtypes of x, weight and experts do not fit")
    if (on_gpu := gpu.kernels("moe", x)) is not None:
        made: Tensor = on_gpu.experts_linear(x, weight_ENK, experts_Tk)
        return made
    kernels, is_bf16 = library.native(x), library.IS_BF16.get(x.dtype)
    choices = tokens * top_k
    if (
        kernels is None
        or is_bf16 is None
        or not (x.stride(1) == 1 if x.dim() == 2 else x.is_contiguous())
        or not weight_ENK.is_contiguous()
        or not experts_Tk.is_contiguous()
        or experts_Tk.dtype is not torch.int64
        or not are_few(kernels, choices, experts)
    ):
        return (_operator if library.is_traced(x) else reference.experts_linear)(x, weight_ENK, experts_Tk)
    y = x.new_empty((tokens, top_k, outputs))
    each, stride = (top_k, x.stride(0)) if x.dim() == 2 else (1, inputs)
    call = _CALL.pack(choices, each, experts, inputs, outputs, stride)
    failed = kernels.experts_linear(
        is_bf16, x.data_ptr(), weight_ENK.data_ptr(), experts_Tk.data_ptr(), y.data_ptr(), call
    )
    if failed:
        library.fail("experts_linear", failed)
    return y


def are_few(kernels: library.Kernels, choices: int, experts: int) -> bool:
    """Whether so many choices are for the C++ functions."""
    return choices <= experts * (_MOST_TOKENS if kernels.has_pairs else _MOST_TOKENS_WITHOUT)


_operator = torch.library.custom_op("bestiary::experts_linear", mutates_args=())(reference.experts_linear)


@_operator.register_fake
def _shape(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    return x.new_empty(*experts.shape, weight.shape[1])
