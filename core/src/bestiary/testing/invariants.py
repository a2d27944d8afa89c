"""Level L3: what may change no answer, be it company, cut, cache or what was given up before."""

from collections.abc import Callable
from typing import Any

import torch

from bestiary.architecture import Architecture
from bestiary.engine import Engine
from bestiary.errors import SettingError
from bestiary.testing.checklist import NotApplicable, check, require
from bestiary.testing.checks import TOLERANCE
from bestiary.testing.fixture import Answer, Fixture

__all__ = ["alone_answers", "declared", "same", "spread"]


def same(fixture: Fixture, found: list[Answer], what: str) -> None:
    """The answers are those of each prompt served alone."""
    for sample, answer, alone in zip(fixture.samples, found, alone_answers(fixture), strict=False):
        require(answer.tokens == alone.tokens, f"{what}: the prompt {sample.token_ids} is answered differently")
        if fixture.pools:
            off = float((answer.vectors - alone.vectors).abs().max())
            require(off <= TOLERANCE, f"{what}: vectors differ by {off:.2g}")


def alone_answers(fixture: Fixture) -> list[Answer]:
    """Each prompt's answer without company, the first time that somebody asks."""
    if not hasattr(fixture, "alone"):
        engine = fixture.engine(enable_prefix_caching=False)
        fixture.alone = [fixture.answers(engine, [sample])[0] for sample in fixture.samples]  # type: ignore[attr-defined]
    found: list[Answer] = fixture.alone  # type: ignore[attr-defined]
    return found


@check("L3")
def _company(fixture: Fixture) -> None:
    """An answer does not depend on who else is in the batch."""
    engine = fixture.engine(enable_prefix_caching=False)
    same(fixture, fixture.answers(engine, fixture.samples), "together")


@check("L3")
def _chunks(fixture: Fixture) -> None:
    """Nor on how a prompt is cut: one token a step, seven, or all."""
    for size in (1, 7):
        engine = fixture.engine(enable_prefix_caching=False, max_num_batched_tokens=size)
        same(fixture, fixture.answers(engine, fixture.samples), f"in chunks of {size}")


@check("L3")
def _block_sizes(fixture: Fixture) -> None:
    """Nor on the size of the cache's blocks."""
    for size in (1, 5):
        engine = fixture.engine(block_size=size, max_num_batched_tokens=11)
        same(fixture, fixture.answers(engine, fixture.samples), f"with blocks of {size}")


@check("L3")
def _prefix_hits(fixture: Fixture) -> None:
    """Nor on what is found in the cache."""
    engine = fixture.engine(block_size=4)
    for _ in range(2):
        found = fixture.answers(engine, fixture.samples)
        same(fixture, found, "with prefixes shared")
    if any(group.fixed is not None for group in engine.executor.groups):
        raise NotApplicable("a state belongs to all of a sequence: no prefix of it is shared")
    # The last token is computed in any case, and with it all that must be computed together.
    is_cut = fixture.parsed(engine, fixture.samples[0]).inputs.prefix == 0
    can_hit = is_cut and engine.executor.pools != "all" and not any(group.crossed for group in engine.executor.groups)
    require(not can_hit or found[0].num_cached > 0, "a prompt that was just served is not found again")


@check("L3")
def _preemption(fixture: Fixture) -> None:
    """Nor on giving all blocks up in the middle of it."""
    engine = fixture.engine(block_size=4, max_num_seqs=3, max_num_batched_tokens=9)
    for i, sample in enumerate(fixture.samples):
        fixture.add(engine, str(i), sample)
    found: dict[str, Answer] = {}
    for moment in range(6):
        for _ in range(2 + moment):
            for output in engine.step() if engine.has_unfinished_requests() else ():
                (one,) = output.outputs
                vectors = torch.cat(output.vectors) if output.vectors else torch.empty(0)
                found[output.request_id] = Answer(list(one.token_ids), torch.empty(0), torch.empty(0), 0, vectors)
        if engine.scheduler.running:
            engine.scheduler.preempt(engine.scheduler.running[-1])
    found |= fixture.drain(engine)
    same(fixture, [found[str(i)] for i in range(len(fixture.samples))], "preempted")


@check("L3")
def _abort(fixture: Fixture) -> None:
    """An answer that is given up leaves nothing behind, and the others alone."""
    engine = fixture.engine(enable_prefix_caching=False)
    for i, sample in enumerate(fixture.samples):
        fixture.add(engine, str(i), sample)
    engine.step()
    engine.abort(["1"])
    found = fixture.drain(engine)
    same(
        fixture, [found.get(str(i), alone_answers(fixture)[i]) for i in range(len(fixture.samples))], "beside an abort"
    )


@check("L3")
def _reused_slots(fixture: Fixture) -> None:
    """A sequence finds nothing of the one that had its place before."""
    engine = fixture.engine(max_num_seqs=1, enable_prefix_caching=False, block_size=8)
    for _ in range(2):
        same(fixture, fixture.answers(engine, fixture.samples), "one after the other")


@check("L3")
def _pipeline(fixture: Fixture) -> None:
    """Two stages give the answers of one."""
    declared(fixture.declared, "pipeline")
    _spread(fixture, "over two stages", stages=2)


@check("L3")
def _tensor(fixture: Fixture) -> None:
    """Ranks that share every matrix give the answers of one."""
    declared(fixture.declared, "tensor")
    _spread(fixture, "over shards", shards=True)


@check("L3")
def _tensor_in_stages(fixture: Fixture) -> None:
    """Two stages of ranks that share every matrix give the answers of one."""
    declared(fixture.declared, "pipeline")
    declared(fixture.declared, "tensor")
    _spread(fixture, "over stages of shards", shards=True, stages=2)


def _spread(fixture: Fixture, what: str, *, stages: int = 1, shards: bool = False) -> None:
    def use(engine: Engine) -> None:
        for _ in range(2):  # the second time with prefixes found
            same(fixture, fixture.answers(engine, fixture.samples), what)

    spread(fixture, use, stages=stages, shards=shards)


def spread(
    fixture: Fixture, use: Callable[[Engine], None], *, stages: int = 1, shards: bool = False, **settings: Any
) -> None:
    """Use an engine over ranks, with blocks and chunks that are not the usual ones, so that cuts fall anywhere."""
    settings |= {"block_size": 5, "max_num_batched_tokens": 11, "pipeline_parallel_size": stages}
    try:
        engine = fixture.engine(**settings, tensor_parallel_size=2 if shards else 1)
    except SettingError:  # two cannot share an odd number of heads
        engine = fixture.engine(**settings, tensor_parallel_size=3)
    try:
        use(engine)
    finally:
        engine.close()


def declared(architecture: Architecture, capability: str) -> None:
    """Raise NotApplicable unless the plugin declares it."""
    if not getattr(architecture, capability):
        raise NotApplicable("not declared")
