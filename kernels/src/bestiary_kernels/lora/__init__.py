"""Low-rank adapters beside a product, each row with its own. Shapes: T rows, S slots, P parts, R rank, K in, N out."""

from struct import Struct

import torch
from torch import Tensor

from bestiary_kernels import gpu, library
from bestiary_kernels.lora import reference

__all__ = ["lora"]

_CALL = Struct("8q")  # LoraCall in cpu.cpp


def lora(
    y_TN: Tensor, x_TK: Tensor, slots_T: Tensor, down_SPRK: Tensor, up_SRN: Tensor, ranks_SP: Tensor, starts: Tensor
) -> Tensor:
    """Add each row's adapter to y, in place, and return it: y[t, part] += (x[t] @ down[s, part].T) @ up[s, :, part].

    `slots_T` int32 is the slot s of each row, -1 for none: such a row stays as it is. `ranks_SP` int32 says how much
    of R counts, 0 for a part without an adapter, whose columns stay; `starts` int32 [P + 1] are the parts' first
    columns, and N. `up` holds the adapter's scale. y, x, down and up have one dtype; both products are float32, and
    what they give is rounded once, when it is added.

    Raises ValueError for shapes, dtypes or starts that do not fit, IndexError for a slot outside the adapters and for a
    rank, of a slot in use, that is below 0 or above R; nothing is written then. Where no row has a slot, ranks and
    starts are not looked at. On a GPU, which nobody asks, rows and parts with such numbers stay as they are, and no
    starts lead outside y.
    """
    rows, columns = y_TN.shape
    slots, parts, most_rank, inputs = down_SPRK.shape
    if (
        x_TK.shape != (rows, inputs)
        or slots_T.shape != (rows,)
        or up_SRN.shape != (slots, most_rank, columns)
        or ranks_SP.shape != (slots, parts)
        or starts.shape != (parts + 1,)
    ):
        raise ValueError("lora: the shapes of y, x, slots, down, up, ranks and starts do not fit")
    dtype = y_TN.dtype
    if not dtype is x_TK.dtype is down_SPRK.dtype is up_SRN.dtype:
        raise ValueError(f"lora: y, x, down and up are {dtype}, {x_TK.dtype}, {down_SPRK.dtype} and {up_SRN.dtype}")
    if (on_gpu := gpu.kernels("lora", y_TN)) is not None:
        on_gpu.lora(y_TN, x_TK, slots_T, down_SPRK, up_SRN, ranks_SP, starts)
        return y_TN
    kernels, is_bf16 = library.native(y_TN), library.IS_BF16.get(dtype)
    if kernels is None or is_bf16 is None or not _is_known(y_TN, x_TK, slots_T, down_SPRK, up_SRN, ranks_SP, starts):
        function = _operator if library.is_traced(y_TN) else reference.lora
        function(y_TN, x_TK, slots_T, down_SPRK, up_SRN, ranks_SP, starts)
        return y_TN
    failed = kernels.lora(
        is_bf16,
        y_TN.data_ptr(),
        x_TK.data_ptr(),
        slots_T.data_ptr(),
        down_SPRK.data_ptr(),
        up_SRN.data_ptr(),
        ranks_SP.data_ptr(),
        starts.data_ptr(),
        _CALL.pack(rows, columns, inputs, slots, parts, most_rank, y_TN.stride(0), x_TK.stride(0)),
    )
    if failed:
        library.fail("lora", failed)
    return y_TN


def _is_known(y: Tensor, x: Tensor, slots: Tensor, down: Tensor, up: Tensor, ranks: Tensor, starts: Tensor) -> bool:
    """Whether the C++ function knows the layouts: rows of y and x may be strided, all else is dense."""
    return (
        torch.int32 is slots.dtype is ranks.dtype is starts.dtype
        and y.stride(1) == x.stride(1) == 1
        and slots.is_contiguous()
        and down.is_contiguous()
        and up.is_contiguous()
        and ranks.is_contiguous()
        and starts.is_contiguous()
    )


@torch.library.custom_op("bestiary::lora", mutates_args=("y",))
def _operator(y: Tensor, x: Tensor, slots: Tensor, down: Tensor, up: Tensor, ranks: Tensor, starts: Tensor) -> None:
    reference.lora(y, x, slots, down, up, ranks, starts)


@_operator.register_fake
def _shapes(y: Tensor, x: Tensor, slots: Tensor, down: Tensor, up: Tensor, ranks: Tensor, starts: Tensor) -> None:
    return None
