"""Low-rank adapters in torch: the meaning of `lora`. Hu et al., 2021 (arXiv 2106.09685)."""

from torch import Tensor

from bestiary_kernels import library

__all__ = ["lora"]


def lora(
    y_TN: Tensor, x_TK: Tensor, slots_T: Tensor, down_SPRK: Tensor, up_SRN: Tensor, ranks_SP: Tensor, starts: Tensor
) -> None:
    """Add the adapters to y in place, slot by slot, in float32 and rounded once. Raises as its caller."""
    used = sorted(set(slots_T.tolist()))
    ranks = _checked_ranks(used, ranks_SP, down_SPRK.shape[2])
    if not ranks:
        return
    bounds = _checked_bounds(starts, y_TN.shape[1])
    for slot, of_parts in ranks.items():
        rows = (slots_T == slot).nonzero()[:, 0]
        for part, rank in enumerate(of_parts):
            if rank:
                columns = slice(bounds[part], bounds[part + 1])
                inner = x_TK[rows].float() @ down_SPRK[slot, part, :rank].float().T
                added = inner @ up_SRN[slot, :rank, columns].float()
                y_TN[rows, columns] = (y_TN[rows, columns].float() + added).to(y_TN.dtype)


def _checked_ranks(used: list[int], ranks_SP: Tensor, most_rank: int) -> dict[int, list[int]]:
    """The ranks of the parts, by slot, of the slots in use."""
    if any(slot < -1 or slot >= ranks_SP.shape[0] for slot in used):
        library.fail("lora", library.BAD_ADAPTER)
    ranks: dict[int, list[int]] = {slot: ranks_SP[slot].tolist() for slot in used if slot >= 0}
    if any(rank < 0 or rank > most_rank for of_parts in ranks.values() for rank in of_parts):
        library.fail("lora", library.BAD_RANK)
    return ranks


def _checked_bounds(starts: Tensor, columns: int) -> list[int]:
    """The parts' first columns, and the number of columns."""
    bounds: list[int] = starts.tolist()
    if bounds[0] != 0 or bounds[-1] != columns or bounds != sorted(bounds):
        library.fail("lora", library.BAD_PARTS)
    return bounds
