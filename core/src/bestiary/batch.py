"""Everything about one step that a layer may need, as tensors. Knows no model and no request.

Shapes: T tokens of the step, ragged over its S sequences; R rows whose output is wanted; B blocks of the longest table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Batch"]


@dataclass(slots=True)
class Batch:
    """One step. It is an argument of every `forward`, never a global."""

    #: [T] int64
    token_ids: Tensor
    #: [T] int64, each token's place in its own sequence
    positions: Tensor
    #: [T] int64, where each token's keys and values go: block x block size + offset
    slots: Tensor
    #: [S + 1] int32, where each sequence's tokens start in the step
    query_starts: Tensor
    #: [S] int32, tokens of each sequence that attention sees, this step's included
    context_lens: Tensor
    #: [S, B] int32, padded with 0
    block_tables: Tensor
    #: [R] int64, rows of the T whose hidden states leave the model; None: all of them
    output_rows: Tensor | None
    #: The paged keys and values of each caching layer of this rank, each [blocks, kv heads, block size, head size].
    caches: Sequence[tuple[Tensor, Tensor]]
