"""The paged cache: which blocks hold whose tokens (blocks, tables) and the tensors behind them (store)."""

from bestiary.cache.blocks import BlockPool
from bestiary.cache.tables import BlockTable, PagedCache

__all__ = ["BlockPool", "BlockTable", "PagedCache"]
