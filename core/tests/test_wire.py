"""Messages between driver and workers: what goes in comes out, and what is broken is an error of one kind."""

from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bestiary.cache import CacheGroup
from bestiary.errors import BestiaryError, EngineError, TensorMismatch, WorkerDied
from bestiary.executor import wire
from bestiary.executor.parallel import Inbox, ParallelExecutor
from bestiary.inputs import NOTHING, Inputs, Item, Look, Span
from bestiary.sampling.params import SamplingParams
from bestiary.sampling.sampler import Choice, Row, TopLogprobs
from bestiary.step import StepResult, StepRow

TOKENS = st.lists(st.integers(0, 2**31), min_size=1, max_size=9)
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    return torch.randint(0, 2, shape).to(draw(st.sampled_from(DTYPES)))


@st.composite
def rows(draw: st.DrawFn) -> StepRow:
    tokens, history = draw(TOKENS), draw(TOKENS)
    penalty = draw(st.sampled_from([1.0, 1.3]))
    params = SamplingParams(
        temperature=draw(st.floats(0, 2)), repetition_penalty=penalty, logit_bias=draw(st.none() | st.just({3: 1.5}))
    )
    sampling = Row(params, history, len(history), draw(st.integers(-(2**63), 2**63 - 1)), [1, 2])
    item = Item.of("image", {"a": draw(tensors()), "b": draw(tensors())}, 2)
    start = draw(st.integers(0, 30))
    inputs = Inputs(
        spans=[Span(item, 5, (True, False, True))],
        crossed=[item] * draw(st.integers(0, 2)),
        looks=[Look(0, 0, 0), Look(7, 0, 2, heeds=False)],
        prefix=draw(st.integers(0, 4)),
        axes=draw(st.none() | st.just(torch.arange(30).view(3, 10))),
        shift=draw(st.integers(-3, 3)),
    )
    return StepRow(
        tokens,
        start,
        draw(st.lists(TOKENS, max_size=3)),
        draw(st.sampled_from([None, sampling])),
        successors=draw(st.just(()) | TOKENS),
        inputs=draw(st.sampled_from([NOTHING, inputs])),
        prompt_logprobs=draw(st.none() | st.integers(0, 20)),
        num_vectors=draw(st.integers(0, 9)),
        is_crossed=draw(st.booleans()),
        adapter=draw(st.integers(-1, 8)),
    )


def passed_on(given_rows: Sequence[StepRow]) -> list[StepRow]:
    step: wire.Step = wire.read(wire.pack(wire.Step.of(7, given_rows)), "command")
    assert step.number == 7
    return step.unpacked()


@given(st.lists(rows(), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_a_row_arrives_as_it_left(given_rows: list[StepRow]) -> None:
    for row, found in zip(given_rows, passed_on(given_rows), strict=True):
        for name in ("tokens", "start", "prompt_logprobs", "num_vectors", "is_crossed", "adapter"):
            assert getattr(found, name) == getattr(row, name)
        assert [list(b) for b in found.blocks] == [list(b) for b in row.blocks]
        assert list(found.successors) == list(row.successors)
        same_sampling(row.sampling, found.sampling)
        same_inputs(row, found.inputs)


def same_sampling(row: Row | None, found: Row | None) -> None:
    if row is None or found is None:
        assert row is found
        return
    assert (found.params, found.seed, found.num_output) == (row.params, row.seed, row.num_output)
    assert list(found.end_ids) == list(row.end_ids) and len(found.tokens) == len(row.tokens)
    if row.params.repetition_penalty != 1:
        assert list(found.tokens) == list(row.tokens)


def same_inputs(row: StepRow, found: Inputs) -> None:
    """As far as tokens from the row's start on can ask."""
    inputs, end = row.inputs, row.start + len(row.tokens)
    assert found.num_crossed == inputs.num_crossed
    for place in range(row.start, end):
        wanted = [(s.item.digest, *s.between(place, place + 1)) for s in inputs.spans if s.end > row.start]
        assert [(s.item.digest, *s.between(place, place + 1)) for s in found.spans] == wanted
    if inputs.crossed or inputs.axes is not None or row.start < 8:
        assert (found.prefix, found.shift, list(found.looks)) == (inputs.prefix, inputs.shift, list(inputs.looks))
    needed = [s.item for s in found.spans if s.start < end] + ([] if row.is_crossed else list(found.crossed))
    for item in needed:
        original = inputs.items[0]
        assert item.tensors.keys() == original.tensors.keys()
        for name, tensor in original.tensors.items():
            assert item.tensors[name].dtype is tensor.dtype and torch.equal(item.tensors[name], tensor)


@given(tensors(), st.none() | st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_a_result_arrives_as_it_left(vectors: torch.Tensor, token: int | None) -> None:
    top = TopLogprobs([1, 2], [-0.5, float("-inf")], 3)
    done: wire.Done = wire.read(wire.pack(wire.Done.of(3, [StepResult(Choice(token, top), [top], vectors)])), "reply")
    (found,) = done.unpacked()
    assert found.choice == Choice(token, top) and found.prompt == [top]
    assert found.vectors is not None and torch.equal(found.vectors, vectors)


@pytest.mark.parametrize("kind", ["command", "reply"])
@given(st.binary(max_size=60))
@settings(max_examples=150, deadline=None)
def test_bytes_that_are_no_message_are_an_engine_error(kind: str, data: bytes) -> None:
    """F14."""
    with pytest.raises(EngineError, match="cannot be read"):
        wire.read(data, kind)


def test_a_message_that_was_cut_short_is_an_engine_error() -> None:
    """F14."""
    data = wire.pack(wire.Step.of(1, [StepRow([1, 2], 0, [[3]], None)]))
    for end in range(len(data)):
        with pytest.raises(EngineError):
            wire.read(data[:end], "command")


def test_an_error_of_ours_keeps_its_class() -> None:
    for error, kind in ((TensorMismatch("x"), TensorMismatch), (ZeroDivisionError("y"), EngineError)):
        failed: wire.Failed = wire.read(wire.pack(wire.Failed.of(1, error)), "reply")
        assert type(failed.error()) is kind and str(error) in str(failed.error())
        assert isinstance(failed.error(), BestiaryError)


class Script:
    """A team whose ranks say what they are told to say."""

    meeting = ""

    def __init__(self, ranks: int, inbox: Inbox) -> None:
        self.inbox, self.ranks, self.stopped = inbox, ranks, False
        self.steps = 0

    def send(self, rank: int, data: bytes) -> None:
        command = wire.read(data, "command")
        replies: list[Any] = []
        match command:
            case wire.Load():
                replies = [wire.Room([CacheGroup(10 + rank)])]
            case wire.Agreed():
                assert command.groups == [CacheGroup(10)]
                replies = [wire.Ready(100, 8, 64, 0, None)]
            case wire.Step():
                replies = self.answer(rank, command)
        for reply in replies:
            self.inbox.put((rank, reply if isinstance(reply, bytes) else wire.pack(reply)))

    def answer(self, rank: int, step: wire.Step) -> list[Any]:
        return [wire.Done.of(step.number, [StepResult(Choice(step.number))] if rank == 0 else [])]

    def look(self) -> None:
        """Nobody dies."""

    def stop(self) -> None:
        self.stopped = True


def spread(kind: type[Script], **settings: Any) -> tuple[ParallelExecutor, Script]:
    from bestiary import registry
    from bestiary.config import EngineConfig

    teams: list[Script] = []

    def start(ranks: int, inbox: Inbox) -> Script:
        teams.append(kind(ranks, inbox))
        return teams[0]

    config = EngineConfig(model="m", tensor_parallel_size=2, **settings)
    executor = ParallelExecutor(config, registry.find("LlamaForCausalLM").load(), Path("nowhere"), start)
    return executor, teams[0]


ROW = StepRow([1], 0, [[0]], None)


def test_a_reply_that_comes_twice_counts_once() -> None:
    """F15."""

    class Twice(Script):
        def answer(self, rank: int, step: wire.Step) -> list[Any]:
            return super().answer(rank, step) * 2

    executor, _ = spread(Twice)
    tokens = [executor.execute([ROW])[0].choice for _ in range(4)]
    assert [choice.token for choice in tokens if choice is not None] == [1, 2, 3, 4]


def test_a_broken_reply_ends_the_ranks() -> None:
    class Broken(Script):
        def answer(self, rank: int, step: wire.Step) -> list[Any]:
            return [b"\xc1"] if rank == 1 else super().answer(rank, step)

    executor, team = spread(Broken)
    with pytest.raises(WorkerDied, match="rank 1"):
        executor.execute([ROW])
    assert team.stopped
    with pytest.raises(WorkerDied):
        executor.execute([ROW])


def test_a_rank_that_fails_alone_ends_them_all_and_all_alike_do_not() -> None:
    class Alone(Script):
        def answer(self, rank: int, step: wire.Step) -> list[Any]:
            failed = wire.Failed.of(step.number, ValueError("no"))
            return [failed] if rank == 0 or step.number == 1 else []

    executor, team = spread(Alone)
    with pytest.raises(EngineError, match="ValueError: no") as caught:
        executor.execute([ROW])
    assert not isinstance(caught.value, WorkerDied) and not team.stopped
    with pytest.raises(WorkerDied, match="rank 0 of the model failed alone"):
        executor.execute([ROW])
    assert team.stopped


def test_a_rank_that_is_gone_is_named() -> None:
    class Gone(Script):
        def answer(self, rank: int, step: wire.Step) -> list[Any]:
            self.inbox.put((1, "it was killed"))
            return []

    executor, _ = spread(Gone)
    with pytest.raises(WorkerDied, match="rank 1 of the model is gone: it was killed"):
        executor.execute([ROW])


def test_a_rank_that_lives_and_never_answers_is_named_in_time() -> None:
    """F13, where the process itself shows nothing: it may wait for ever inside a step."""

    class Stuck(Script):
        def answer(self, rank: int, step: wire.Step) -> list[Any]:
            return [] if rank == 1 else super().answer(rank, step)

    executor, team = spread(Stuck, execute_model_timeout_seconds=0.3)
    with pytest.raises(WorkerDied, match=r"rank 1 of the model hangs: no answer to a step for 0\.[3-9] s"):
        executor.execute([ROW])
    assert team.stopped


def test_the_inbox_is_a_queue() -> None:
    assert isinstance(spread(Script)[1].inbox, SimpleQueue)
