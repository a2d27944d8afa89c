"""The next tokens: the best of each row, or one drawn by temperature, min-p, top-k and top-p.

Shapes: R rows, V vocabulary.
"""

import torch
from torch import Tensor

from bestiary_kernels import gpu, library
from bestiary_kernels.sampling import reference

__all__ = ["draw", "greedy"]


def greedy(logits_RV: Tensor) -> Tensor:
    """Return the token with the largest logit of each row, int64 [R]; -1 where any is NaN or the largest is infinite.

    Of equal ones it is the first. Raises ValueError for logits that are not floating point, or of no token.
    """
    rows, vocabulary = logits_RV.shape
    if not logits_RV.is_floating_point() or not vocabulary:
        raise ValueError(f"greedy: logits {tuple(logits_RV.shape)} must be floating point, of one token at least")
    if (on_gpu := gpu.kernels("sampling", logits_RV)) is not None:
        found: Tensor = on_gpu.greedy(logits_RV)
        return found
    kernels, is_bf16 = library.native(logits_RV), library.IS_BF16.get(logits_RV.dtype)
    if kernels is None or is_bf16 is None or logits_RV.stride(1) != 1:
        return (_greedy_operator if library.is_traced(logits_RV) else reference.greedy)(logits_RV)
    tokens = logits_RV.new_empty(rows, dtype=torch.int64)
    at = logits_RV.data_ptr(), tokens.data_ptr()
    if failed := kernels.greedy(is_bf16, *at, rows, vocabulary, logits_RV.stride(0)):
        library.fail("greedy", failed)
    return tokens


def draw(
    logits_RV: Tensor, temperatures_R: Tensor, top_ks_R: Tensor, top_ps_R: Tensor, min_ps_R: Tensor, uniforms_R: Tensor
) -> Tensor:
    """Return a token for each row, int64 [R], by inverting the distribution that is left in vocabulary order.

    logits are float32; temperatures float32, above 0; top_ks int32, below 1 for no limit; top_ps float32, 1 for no
    limit; min_ps float32, 0 for no limit; uniforms float64 in [0, 1). Scores are logits / temperature. Of a row's
    tokens min-p leaves those at least min_p times as likely as the best; top-k of these the k best; top-p of those the
    fewest that have p of their weight, the best first. Tokens tied with the last that is left stay. Weights are added
    up in float64; the token is the first at which the sum exceeds uniform times the whole. A row's token depends on
    that row alone. Of rows with numbers that are not finite any token may come. Raises ValueError for shapes or dtypes
    that do not fit.
    """
    rows, vocabulary = logits_RV.shape
    parameters = (temperatures_R, top_ks_R, top_ps_R, min_ps_R, uniforms_R)
    kinds = (torch.float32, torch.int32, torch.float32, torch.float32, torch.float64)
    if any(one.shape != (rows,) or one.dtype is not kind for one, kind in zip(parameters, kinds, strict=True)):
        raise ValueError(f"draw: each parameter must be one number for each of {rows} rows, of its dtype")
    if logits_RV.dtype is not torch.float32 or not vocabulary:
        raise ValueError(f"draw: logits {tuple(logits_RV.shape)} must be float32, of one token at least")
    if (on_gpu := gpu.kernels("sampling", logits_RV)) is not None:
        found: Tensor = on_gpu.draw(logits_RV, *parameters)
        return found
    kernels = library.native(logits_RV)
    if kernels is None or logits_RV.stride(1) != 1:
        return (_operator if library.is_traced(logits_RV) else reference.draw)(logits_RV, *parameters)
    tokens = logits_RV.new_empty(rows, dtype=torch.int64)
    dense = [one.contiguous() for one in parameters]
    failed = kernels.draw(
        logits_RV.data_ptr(),
        *(one.data_ptr() for one in dense),
        tokens.data_ptr(),
        rows,
        vocabulary,
        logits_RV.stride(0),
    )
    if failed:
        library.fail("draw", failed)
    return tokens


@torch.library.custom_op("bestiary::draw", mutates_args=())
def _operator(
    logits: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor, uniforms: Tensor
) -> Tensor:
    return reference.draw(logits, temperatures, top_ks, top_ps, min_ps, uniforms)


@_operator.register_fake
def _shape(
    logits: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor, uniforms: Tensor
) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


@torch.library.custom_op("bestiary::greedy", mutates_args=())
def _greedy_operator(logits: Tensor) -> Tensor:
    return reference.greedy(logits)


@_greedy_operator.register_fake
def _greedy_shape(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)
