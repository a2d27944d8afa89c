"""Low-rank adapters."""

import torch

from bestiary_kernels import lora

from .draw import DTYPES, Draw, case, close, normal, within


@case
def adapters(draw: Draw, device: torch.device) -> None:
    """Rows of many slots or of runs of one; parts without an adapter; what a rank leaves out of its memory is NaN."""
    dtype, rows = draw.choice(DTYPES), draw.choice((0, 1, 7, 20, 140))
    count, parts, most_rank = draw.integer(1, 3), draw.integer(1, 3), draw.choice((1, 8, 16, 21))
    inputs, widths = draw.choice((1, 33, 128, 1100)), [draw.choice((0, 1, 64, 150, 530)) for _ in range(parts)]
    run, columns = draw.choice((1, 9, 70)), sum(widths)
    slots = [draw.integer(-1, count - 1) for _ in range(-(-rows // run))]
    of_rows = [slots[row // run] for row in range(rows)]
    ranks = [[draw.choice((0, 1, most_rank)) for _ in range(parts)] for _ in range(count)]
    starts = [sum(widths[:part]) for part in range(parts + 1)]
    x = within(draw, rows, inputs, more=(0, 3), dtype=dtype, device=device)
    buffer = normal(draw, rows, columns + draw.choice((0, 5)), dtype=dtype, device=device)
    down = normal(draw, count, parts, most_rank, inputs, dtype=dtype, device=device) * inputs**-0.5
    up = normal(draw, count, most_rank, columns, dtype=dtype, device=device)
    y = buffer[:, :columns]
    before, wanted = buffer.clone(), y.double()
    size = wanted.abs()
    for slot in range(count):
        own = torch.tensor([row for row in range(rows) if of_rows[row] == slot], dtype=torch.int64, device=device)
        for part, rank in enumerate(ranks[slot]):
            at = slice(starts[part], starts[part + 1])
            down[slot, part, rank:], up[slot, rank:, at] = torch.nan, torch.nan
            a, b = down[slot, part, :rank].double(), up[slot, :rank, at].double()
            wanted[own, at] += x[own].double() @ a.T @ b
            size[own, at] += x[own].double().abs() @ a.abs().T @ b.abs()
    tables = (torch.tensor(t, dtype=torch.int32, device=device) for t in (ranks, starts))
    found = lora(y, x, torch.tensor(of_rows, dtype=torch.int32, device=device), down, up, *tables)
    assert found is y and torch.equal(buffer[:, columns:], before[:, columns:])
    close(y, wanted, size)
    for row, slot in enumerate(of_rows):
        for part in range(parts):
            if slot < 0 or not ranks[slot][part]:
                at = slice(starts[part], starts[part + 1])
                assert torch.equal(y[row, at], before[row, :columns][at])
