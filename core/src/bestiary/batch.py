"""Everything about one step that a layer may need, as tensors. Knows no model and no request.

Shapes: T tokens of the step, ragged over its S sequences; R rows whose output is wanted; B blocks of the longest table.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Batch", "Crossing", "Pages", "Slots", "Vectors"]


@dataclass(slots=True)
class Pages:
    """Where the tokens of one group of layers are kept."""

    #: [S, B] int32; what lies beyond a sequence's end, or slid out of its window, is any number.
    blocks: Tensor
    #: [T] int64, where each token of this step goes: block x block size + offset
    slots: Tensor


@dataclass(slots=True)
class Slots:
    """Where sequences' states of one group of layers are kept; a step reads one slot and writes another, [S] int64."""

    read: Tensor
    write: Tensor
    #: [S] bool, sequences that have no state yet
    fresh: Tensor


@dataclass(slots=True)
class Crossing:
    """What the sequences look at beside their tokens, of one group of layers: N vectors are new in this step."""

    #: [S, B] int32
    blocks: Tensor
    #: [S] int32, vectors that each sequence looks at; 0: none
    lens: Tensor
    #: [N, width], and [N] int64 where their keys and values go; None where there is none that is new.
    vectors: Tensor | None
    slots: Tensor | None
    #: [T] bool, tokens of sequences that look at anything; None: all are, or where nobody looks none is.
    looking: Tensor | None = None
    nobody: bool = False
    #: [T, 2] int32, the first vector and the one after the last that each token looks at; None: all of its sequence's.
    ranges: Tensor | None = None
    #: [T] bool, tokens whose layers go on with what they made of looking; None: all are.
    heeds: Tensor | None = None


@dataclass(slots=True)
class Vectors:
    """What stands in the place of some tokens' embeddings."""

    #: [M] int64, rows of the T
    rows: Tensor
    #: [M, width]
    values: Tensor


@dataclass(slots=True)
class Batch:
    """One step. It is an argument of every `forward`, never a global."""

    #: [T] int64
    token_ids: Tensor
    #: [T] int64, each token's place in its own sequence
    positions: Tensor
    #: [S + 1] int32, where each sequence's tokens start in the step
    query_starts: Tensor
    #: [S] int32, tokens of each sequence that attention sees, this step's included
    context_lens: Tensor
    #: [R] int64, rows of the T whose hidden states leave the model; None: all of them
    output_rows: Tensor | None
    #: By group of layers that keep alike, where it keeps: every token, or a state for each sequence.
    pages: Mapping[int, Pages]
    states: Mapping[int, Slots]
    #: For each layer of this rank that keeps something, the tensors: keys and values are [blocks, heads, block size,
    #: head size] each.
    caches: Sequence[tuple[Tensor, ...]]
    #: By group of layers, what sequences look at beside their own tokens.
    crossings: Mapping[int, Crossing] = field(default_factory=dict)
    #: Embeddings that come from elsewhere.
    vectors: Vectors | None = None
    #: [S] int32, tokens at each sequence's start that are seen from everywhere among them; None: no sequence has any.
    prefixes: Tensor | None = None
    #: [axes, T] int64, positions on the axes of a rotation that has several; None: `positions` on each.
    axes: Tensor | None = None
    #: By way of turning, the angles of the step's tokens: what the first layer that turns so gathered, the others take.
    angles: dict[Hashable, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)
