"""greedy and draw: borders that rounding decides, alike alone and in company on every backend, what is refused."""

import math

import pytest
import torch
from torch import Tensor

from bestiary_kernels import draw, gpu, greedy, library
from bestiary_kernels.sampling import _greedy_operator, _operator, reference

from .grid.interpreter import interpreted

BACKENDS = library.status().available
ALMOST_ONE = 1 - 2**-53


def ask(logits: Tensor, *, temperature: float = 1, top_k: int = 0, top_p: float = 1, at: float = ALMOST_ONE) -> Tensor:
    """All rows alike, without min-p."""
    rows = len(logits)
    return draw(
        logits,
        torch.full((rows,), temperature, dtype=torch.float32),
        torch.full((rows,), top_k, dtype=torch.int32),
        torch.full((rows,), top_p, dtype=torch.float32),
        torch.zeros(rows),
        torch.full((rows,), at, dtype=torch.float64),
    )


def border(row: Tensor) -> list[float]:
    """Two neighbouring float32 p between which the last token of this row alone changes."""
    low, high = torch.tensor(0.3), torch.tensor(0.7)
    last = {float(p): int(ask(row, top_p=float(p))) for p in (low, high)}
    while torch.nextafter(low, high) < high:
        middle = (low + high) / 2
        last[float(middle)] = int(ask(row, top_p=float(middle)))
        low, high = (middle, high) if last[float(middle)] == last[float(low)] else (low, middle)
    return [float(low), float(high)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nucleus_is_the_same_alone_and_in_company_to_the_last_bit_of_p(backend: str) -> None:
    """Threads split a sum by how many rows there are, and a rounding error decides where p ends a nucleus exactly."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        logits = torch.randn(8, 20_000) * 2.5
        with library.using(backend):
            for r in (1, 6):
                for p in border(logits[r : r + 1].clone()):
                    assert ask(logits, top_p=p)[r] == ask(logits[r : r + 1].clone(), top_p=p)[0]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_a_draw_reaches_all_of_a_large_vocabulary(backend: str) -> None:
    if backend == "triton" and not gpu.is_installed():
        pytest.skip("Triton is not installed")
    falling, level = -torch.arange(9001.0)[None] / 1000, torch.zeros(1, 9001)
    with interpreted() if backend == "triton" else library.using(backend):
        assert [int(ask(falling, top_k=6000, at=at)) for at in (0.0, ALMOST_ONE)] == [0, 5999]
        assert [int(ask(level, at=at)) for at in (0.2, 0.6, ALMOST_ONE)] == [1800, 5400, 9000]


def test_the_size_of_the_first_look_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(20, 3000)
    settings = [{"top_p": 0.9}, {"top_p": 0.99, "top_k": 2500}, {"top_k": 40}, {"top_p": 0.3}]
    with library.using("reference"):
        expected = [ask(logits, **one, at=0.6) for one in settings]  # type: ignore[arg-type]
        for width in (1, 8, 200, 10_000):
            monkeypatch.setattr(reference, "_FIRST_LOOK", width)
            for one, wanted in zip(settings, expected, strict=True):
                assert torch.equal(ask(logits, **one, at=0.6), wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_no_numbers_do_not_touch_the_others(backend: str, bad: float) -> None:
    logits = torch.randn(3, 200)
    with library.using(backend):
        alone = ask(logits[:1].clone(), top_p=0.9, top_k=7, at=0.4)
        logits[1], logits[2, 5] = bad, bad
        found = ask(logits, top_p=0.9, top_k=7, at=0.4)
    assert found[0] == alone[0] and ((found >= 0) & (found < 200)).all()


def test_parameters_that_do_not_fit_are_refused() -> None:
    good = [torch.ones(2), torch.zeros(2, dtype=torch.int32), torch.ones(2), torch.zeros(2), torch.zeros(2).double()]
    draw(torch.zeros(2, 5), *good)
    for place, wrong in ((0, torch.ones(3)), (1, torch.zeros(2)), (4, torch.zeros(2))):
        with pytest.raises(ValueError, match="each parameter"):
            draw(torch.zeros(2, 5), *(wrong if i == place else one for i, one in enumerate(good)))
    with pytest.raises(ValueError, match="must be float32"):
        draw(torch.zeros(2, 5).double(), *good)
    with pytest.raises(ValueError, match="of one token"):
        draw(torch.zeros(2, 0), *good)


def test_only_logits_have_a_best_token() -> None:
    for wrong in (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 0)):
        with pytest.raises(ValueError, match="must be floating point, of one token at least"):
            greedy(wrong)


def test_the_operators_pass_torchs_checks() -> None:
    torch.library.opcheck(_greedy_operator, (torch.randn(2, 5),))
    good = [torch.ones(2), torch.zeros(2, dtype=torch.int32), torch.ones(2), torch.zeros(2), torch.zeros(2).double()]
    torch.library.opcheck(_operator, (torch.randn(2, 5), *good))
