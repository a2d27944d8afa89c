"""Small sums and products, and a matrix for each head: what is refused, and how torch's tools see them."""

import pytest
import torch

from bestiary_kernels import add, heads_linear, library, scaled
from bestiary_kernels.heads import _operator as heads_operator
from bestiary_kernels.pointwise import _add_operator, _scaled_operator


def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(3, 8)
    for y, gate in ((x[:2], None), (x.bfloat16(), None), (x, torch.ones(3)), (x, torch.ones(2, 1))):
        with pytest.raises(ValueError, match="add: the shapes or dtypes"):
            add(x, y, gate)
    with pytest.raises(ValueError, match="the cap is 0"):
        scaled(x, cap=0.0)
    x, weight = torch.randn(3, 2, 8), torch.randn(2, 8, 5)
    for other in (weight[:1], weight[:, :7], weight.bfloat16(), weight[0]):
        with pytest.raises(ValueError, match="heads_linear: x"):
            heads_linear(x, other)
    with pytest.raises(ValueError, match="heads_linear: out"):
        heads_linear(x, weight, torch.empty(3, 2, 6))


@pytest.mark.parametrize("backend", library.status().available)
def test_what_is_no_number_stays_none(backend: str) -> None:
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0]])
    with library.using(backend):
        assert scaled(x, cap=3.0)[0, 1:].tolist() == [3.0, -3.0, 0.0]
        assert scaled(x, cap=3.0)[0, 0].isnan() and add(x, x)[0, 0].isnan()


def test_the_operators_pass_torchs_checks() -> None:
    x = torch.randn(3, 8)
    torch.library.opcheck(_add_operator, (x, x.clone(), torch.randn(3, 1)))
    torch.library.opcheck(_scaled_operator, (x, 2.0, 30.0))
    torch.library.opcheck(heads_operator, (torch.randn(3, 2, 8), torch.randn(2, 8, 5)))
    assert add(x.to("meta"), x.to("meta")).is_meta and scaled(x.to("meta")).is_meta
    assert heads_linear(torch.empty(3, 2, 8, device="meta"), torch.empty(2, 8, 5, device="meta")).shape == (3, 2, 5)
