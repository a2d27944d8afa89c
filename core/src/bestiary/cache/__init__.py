"""The paged cache: which blocks hold whose tokens (blocks, groups, tables) and the tensors behind them (store)."""

from bestiary.cache.blocks import BlockPool
from bestiary.cache.groups import GONE, CacheGroup
from bestiary.cache.tables import BlockTable, PagedCache

__all__ = ["GONE", "BlockPool", "BlockTable", "CacheGroup", "PagedCache"]
