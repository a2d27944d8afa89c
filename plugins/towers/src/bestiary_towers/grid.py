"""Places of patches in a picture, and the angles by which attention turns with row and column. Knows no tower."""

import torch
from torch import Tensor

__all__ = ["axial_angles", "places"]


def places(rows: int, columns: int, merge: int = 1) -> Tensor:
    """[rows x columns, 2] int64: row and column of each patch of a picture.

    Row by row; with `merge` above 1 the patches of each merge x merge square follow each other.
    """
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    squares = grid.view(rows // merge, merge, columns // merge, merge, 2)
    return squares.transpose(1, 2).reshape(-1, 2)


def axial_angles(places_T2: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """[T, 2, F + F] float32: cosines and sines of row x `by_row` [F], then of column x `by_column` [F].

    Rotary embedding (Su et al. 2021, arXiv 2104.09864) with a share of the frequencies for each axis.
    """
    row_T, column_T = places_T2.float().unbind(1)
    angles = torch.cat((torch.outer(row_T, by_row), torch.outer(column_T, by_column)), 1)
    return torch.stack((angles.cos(), angles.sin()), 1)
