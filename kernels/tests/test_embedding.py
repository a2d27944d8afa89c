"""Rows of a table against torch's indexing."""

import pytest
import torch

import bestiary_kernels as kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 7, 64])
def test_rows_are_torchs(dtype: torch.dtype, width: int) -> None:
    table = torch.randn(50, width).to(dtype)
    ids = torch.tensor([0, 49, 7, 7, 31])
    assert torch.equal(kernels.embedding(table, ids), table[ids])
    assert kernels.embedding(table, ids[:0]).shape == (0, width)


def test_many_rows_are_copied_in_parallel(variant: str) -> None:
    table, ids = torch.randn(50, 300), torch.randint(0, 50, (990,))
    assert torch.equal(kernels.embedding(table, ids), table[ids])


def test_a_table_with_gaps_between_its_rows_is_read_right() -> None:
    table = torch.randn(20, 16)[:, :8]
    assert torch.equal(kernels.embedding(table, torch.tensor([3, 1])), table[[3, 1]])


@pytest.mark.parametrize("bad", [-1, 20, 2**40])
def test_an_id_outside_the_table_raises(bad: int) -> None:
    with pytest.raises(IndexError):
        kernels.embedding(torch.randn(20, 8), torch.tensor([1, bad]))


def test_shapes_that_do_not_fit_raise() -> None:
    with pytest.raises(ValueError, match="embedding"):
        kernels.embedding(torch.randn(20), torch.tensor([1]))
    with pytest.raises(ValueError, match="embedding"):
        kernels.embedding(torch.randn(20, 8), torch.tensor([1], dtype=torch.int32))


def test_the_operator_has_a_schema_and_a_fake() -> None:
    torch.library.opcheck(torch.ops.bestiary.embedding, (torch.randn(20, 8), torch.tensor([1, 2])))
