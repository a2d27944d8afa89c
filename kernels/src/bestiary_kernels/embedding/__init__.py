"""Rows of a table by their numbers. Shapes: T tokens, V rows, D width."""

import torch
from torch import Tensor

from bestiary_kernels import gpu, library
from bestiary_kernels.embedding import reference

__all__ = ["embedding"]


def embedding(table_VD: Tensor, ids_T: Tensor) -> Tensor:
    """Return the rows `ids_T` (int64) of a table of any dtype, [T, D].

    Raises ValueError for shapes or dtypes that do not fit, IndexError for an id outside the table; on a GPU, where
    nothing waits for the ids, such a row is zeros.
    """
    if table_VD.dim() != 2 or ids_T.dim() != 1 or ids_T.dtype is not torch.int64:
        raise ValueError(f"embedding: the table {tuple(table_VD.shape)} must be [V, D] and the ids int64 [T]")
    if (on_gpu := gpu.kernels("embedding", table_VD)) is not None:
        found: Tensor = on_gpu.embedding(table_VD, ids_T)
        return found
    kernels = library.native(table_VD)
    if kernels is None or not table_VD.is_contiguous() or not ids_T.is_contiguous():
        function = _operator if library.is_traced(table_VD) else reference.embedding
        return function(table_VD, ids_T)
    rows, width = table_VD.shape
    y = table_VD.new_empty(ids_T.shape[0], width)
    row_bytes = width * table_VD.element_size()
    failed = kernels.embedding(table_VD.data_ptr(), ids_T.data_ptr(), y.data_ptr(), rows, row_bytes, ids_T.shape[0])
    if failed:
        library.fail("embedding", failed)
    return y


@torch.library.custom_op("bestiary::embedding", mutates_args=())
def _operator(table: Tensor, ids: Tensor) -> Tensor:
    return reference.embedding(table, ids)


@_operator.register_fake
def _shapes(table: Tensor, ids: Tensor) -> Tensor:
    return table.new_empty(ids.shape[0], table.shape[1])
