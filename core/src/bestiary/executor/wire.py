"""What driver and workers say to each other, as msgpack: typed messages, tensors as their bytes, and never pickle.

A step's rows are sent anew each time, with no more of a prompt's items than the step can ask for.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from msgspec.structs import astuple
from torch import Tensor

from bestiary import errors
from bestiary.cache import CacheGroup
from bestiary.errors import BestiaryError, EngineError
from bestiary.inputs import NOTHING, Inputs, Item, Look, Span
from bestiary.sampling.params import SamplingParams
from bestiary.sampling.sampler import Choice, Row, TopLogprobs
from bestiary.step import StepResult, StepRow

__all__ = [
    "AddAdapter",
    "Added",
    "Agreed",
    "Command",
    "Done",
    "Failed",
    "Load",
    "PlaceAdapter",
    "Ready",
    "RemoveAdapter",
    "Reply",
    "Room",
    "Step",
    "pack",
    "read",
]


class _Tensor(msgspec.Struct, array_like=True):
    dtype: str
    shape: list[int]
    data: bytes

    @classmethod
    def of(cls, tensor: Tensor) -> "_Tensor":
        plain = tensor.detach().cpu().contiguous()
        data = bytes(plain.reshape(-1).view(torch.uint8).numpy().data) if plain.numel() else b""
        return cls(str(plain.dtype).removeprefix("torch."), list(plain.shape), data)

    def tensor(self) -> Tensor:
        dtype = getattr(torch, self.dtype)
        if not self.data:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(bytearray(self.data), dtype=dtype).view(self.shape)


class _Item(msgspec.Struct, array_like=True):
    modality: str
    tensors: dict[str, _Tensor]
    num_vectors: int
    digest: bytes


class _Inputs(msgspec.Struct, array_like=True):
    """What a prompt brings, as far as tokens from some place on can ask for it."""

    items: list[_Item]
    spans: list[tuple[int, int, list[bool]]]
    crossed: list[int]
    looks: list[tuple[int, int, int, bool]]
    prefix: int
    axes: _Tensor | None
    shift: int


class _Sampling(msgspec.Struct, array_like=True):
    params: SamplingParams
    #: The tokens where a penalty reads them, else only how many there are.
    tokens: list[int] | int
    num_prompt: int
    seed: int
    end_ids: list[int]


#: From here on a row's fields travel as they are.
_AS_IT_IS = 6


class _Row(msgspec.Struct, array_like=True):
    """The fields of StepRow, in its order."""

    tokens: list[int]
    start: int
    blocks: list[list[int]]
    sampling: _Sampling | None
    successors: list[int]
    inputs: _Inputs | None
    prompt_logprobs: int | None
    num_vectors: int
    is_crossed: bool
    adapter: int


class _Result(msgspec.Struct, array_like=True):
    choice: Choice | None
    prompt: list[TopLogprobs]
    vectors: _Tensor | None


class Load(msgspec.Struct, tag=True):
    """Load a model and join the others."""

    #: The fields of EngineConfig.
    config: dict[str, Any]
    folder: str
    #: What the driver found installed: architecture, distribution, version, entry point, and the core's version.
    plugin: dict[str, str]
    rank: int
    #: Where ranks find each other.
    meeting: str


class Agreed(msgspec.Struct, tag=True):
    """The cache that all ranks have room for."""

    groups: list[CacheGroup]


class Step(msgspec.Struct, tag=True):
    """Run these rows."""

    number: int
    rows: list[_Row]

    @classmethod
    def of(cls, number: int, rows: Sequence[StepRow]) -> "Step":
        """Of rows as the runner takes them."""
        return cls(number, [_packed_row(row) for row in rows])

    def unpacked(self) -> list[StepRow]:
        """The rows."""
        return [_row(row) for row in self.rows]


class AddAdapter(msgspec.Struct, tag=True):
    """Read an adapter into memory."""

    number: int
    key: str
    folder: str


class PlaceAdapter(msgspec.Struct, tag=True):
    """Fill a slot with one."""

    number: int
    key: str
    slot: int


class RemoveAdapter(msgspec.Struct, tag=True):
    """Let one go."""

    number: int
    key: str


class Added(msgspec.Struct, tag=True):
    """An adapter is in memory."""

    number: int
    digest: bytes


class Room(msgspec.Struct, tag=True):
    """The cache that a rank has room for."""

    groups: list[CacheGroup]


class Ready(msgspec.Struct, tag=True):
    """The model is there."""

    vocabulary: int
    width: int
    max_model_len: int
    most_crossed: int
    pools: str | None


class Done(msgspec.Struct, tag=True):
    """What a step found; nothing from ranks that do not answer."""

    number: int
    results: list[_Result]

    @classmethod
    def of(cls, number: int, results: Sequence[StepResult]) -> "Done":
        """Of results as the runner gives them."""
        packed = [
            _Result(r.choice, list(r.prompt), None if r.vectors is None else _Tensor.of(r.vectors)) for r in results
        ]
        return cls(number, packed)

    def unpacked(self) -> list[StepResult]:
        """The results."""
        return [StepResult(r.choice, r.prompt, None if r.vectors is None else r.vectors.tensor()) for r in self.results]


class Failed(msgspec.Struct, tag=True):
    """Loading, or a step, ended with an error; the worker goes on."""

    number: int
    kind: str
    text: str

    @classmethod
    def of(cls, number: int, error: Exception) -> "Failed":
        """Of what was raised."""
        return cls(number, type(error).__name__, str(error))

    def error(self) -> BestiaryError:
        """The same error, where it is one of ours."""
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, BestiaryError):
            return kind(self.text)
        return EngineError(f"{self.kind}: {self.text}")


Command = Load | Agreed | Step | AddAdapter | PlaceAdapter | RemoveAdapter
Reply = Room | Ready | Done | Added | Failed

pack = msgspec.msgpack.Encoder().encode
_COMMANDS, _REPLIES = msgspec.msgpack.Decoder(Command), msgspec.msgpack.Decoder(Reply)


def read(data: bytes, kind: str) -> Any:
    """A command, or a reply. Raises EngineError for bytes that are none."""
    try:
        return (_COMMANDS if kind == "command" else _REPLIES).decode(data)
    except (msgspec.DecodeError, ValueError) as error:
        raise EngineError(f"a {kind} between the processes of the engine cannot be read ({error})") from None


def _packed_row(row: StepRow) -> _Row:
    blocks = [list(blocks) for blocks in row.blocks]
    sampling = None if row.sampling is None else _packed_sampling(row.sampling)
    inputs = None if _is_plain(row) else _packed_inputs(row)
    return _Row(list(row.tokens), row.start, blocks, sampling, list(row.successors), inputs, *astuple(row)[_AS_IT_IS:])


def _is_plain(row: StepRow) -> bool:
    """Nothing of what the prompt brings matters any more."""
    return row.inputs.ends_before(row.start) and not row.inputs.shift and not row.inputs.crossed


def _row(row: _Row) -> StepRow:
    sampling = None if row.sampling is None else _sampling(row.sampling)
    inputs = NOTHING if row.inputs is None else _inputs(row.inputs)
    return StepRow(row.tokens, row.start, row.blocks, sampling, row.successors, inputs, *astuple(row)[_AS_IT_IS:])


def _packed_sampling(row: Row) -> _Sampling:
    params = row.params
    reads = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    tokens = list(row.tokens) if reads else len(row.tokens)
    return _Sampling(params, tokens, row.num_prompt, row.seed, list(row.end_ids))


def _sampling(row: _Sampling) -> Row:
    tokens = range(row.tokens) if isinstance(row.tokens, int) else row.tokens
    return Row(row.params, tokens, row.num_prompt, row.seed, row.end_ids)


def _packed_inputs(row: StepRow) -> _Inputs:
    """Items whose vectors the step may need go with their tensors, the others by their digest alone."""
    inputs, end = row.inputs, row.start + len(row.tokens)
    spans = [span for span in inputs.spans if span.end > row.start]
    needed = {id(span.item) for span in spans if span.start < end}
    needed |= set() if row.is_crossed else set(map(id, inputs.crossed))
    some = [*(span.item for span in spans), *inputs.crossed]
    items = {id(item): _packed_item(item, full=id(item) in needed) for item in some}
    numbers = {key: number for number, key in enumerate(items)}
    axes = inputs.axes
    if axes is not None and row.start >= axes.shape[1]:
        axes = axes[:, :0]  # beyond the prompt only their number counts
    return _Inputs(
        list(items.values()),
        [(numbers[id(span.item)], span.start, list(span.takes)) for span in spans],
        [numbers[id(item)] for item in inputs.crossed],
        [(look.start, look.first, look.end, look.heeds) for look in inputs.looks],
        inputs.prefix,
        None if axes is None else _Tensor.of(axes),
        inputs.shift,
    )


def _packed_item(item: Item, *, full: bool) -> _Item:
    tensors = {name: _Tensor.of(tensor) for name, tensor in item.tensors.items()} if full else {}
    return _Item(item.modality, tensors, item.num_vectors, item.digest)


def _inputs(inputs: _Inputs) -> Inputs:
    items = [
        Item(item.modality, {name: t.tensor() for name, t in item.tensors.items()}, item.num_vectors, item.digest)
        for item in inputs.items
    ]
    return Inputs(
        spans=[Span(items[number], start, tuple(takes)) for number, start, takes in inputs.spans],
        crossed=[items[number] for number in inputs.crossed],
        looks=[Look(*look) for look in inputs.looks],
        prefix=inputs.prefix,
        axes=None if inputs.axes is None else inputs.axes.tensor(),
        shift=inputs.shift,
    )
