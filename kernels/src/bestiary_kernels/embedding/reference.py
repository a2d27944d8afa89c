"""The meaning of `embedding`, in plain torch. Shapes: T tokens, V rows, D width."""

import torch
from torch import Tensor

__all__ = ["embedding"]


def embedding(table_VD: Tensor, ids_T: Tensor) -> Tensor:
    """Return the rows `ids_T` of the table, [T, D]."""
    return torch.nn.functional.embedding(ids_T, table_VD)
