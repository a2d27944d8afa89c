"""What concerns LoRA adapters: each does what merging it would do, in any company and however the model is spread."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bestiary.engine import Engine
from bestiary.errors import RequestError
from bestiary.testing import adapters
from bestiary.testing.checklist import check, require
from bestiary.testing.checks import DIFFERENCE, TOLERANCE
from bestiary.testing.fixture import Answer, Fixture
from bestiary.testing.invariants import alone_answers, declared, spread

__all__: list[str] = []

_RANK, _ALPHA = 3, 6.0


@dataclass(frozen=True)
class _Adapter:
    """An adapter, and what the checkpoint that it was merged into answers: the first prompt with every number."""

    folder: Path
    first: Answer
    merged: list[Answer]


def _adapters(fixture: Fixture) -> Sequence[_Adapter]:
    """One beside every matrix, and one of another rank beside every other matrix; made once for a case."""
    if not hasattr(fixture, "adapters"):
        declared(fixture.declared, "lora")
        found = adapters.matrices(fixture.declared, fixture.folder, fixture.tensor_shapes())
        require(bool(found), "the checkpoint has no matrix beside which an adapter could stand")
        first = _make(fixture, "all", found, _RANK)
        fixture.adapters = [first, _make(fixture, "half", found[::2], _RANK + 2)]  # type: ignore[attr-defined]
    made: list[_Adapter] = fixture.adapters  # type: ignore[attr-defined]
    return made


def _make(fixture: Fixture, name: str, found: Sequence[adapters.Matrix], rank: int) -> _Adapter:
    pairs = adapters.random_pairs(found, rank, seed=rank)
    folder = adapters.save(fixture.place(f"adapter-{name}"), pairs, _tables(found), rank, _ALPHA)
    checkpoint = fixture.rewritten(f"merged-{name}", adapters.merged(pairs, found, _ALPHA / rank))
    engine = fixture.engine(checkpoint, enable_prefix_caching=False)
    (first,) = fixture.answers(engine, fixture.samples[:1], logprobs=True)
    return _Adapter(folder, first, [fixture.answers(engine, [sample])[0] for sample in fixture.samples])


def _tables(found: Sequence[adapters.Matrix]) -> set[str]:
    return {matrix.module for matrix in found if matrix.is_table}


def _off(fixture: Fixture, found: Answer, wanted: Answer) -> float:
    """How far an answer with all log-probabilities is from another; infinite where a token differs."""
    if fixture.pools:
        return float((found.vectors - wanted.vectors).abs().max())
    if found.tokens != wanted.tokens:
        return float("inf")
    return float((found.logprobs - wanted.logprobs).abs().nan_to_num().max())


def _is_merged(fixture: Fixture, engine: Engine, name: str, adapter: _Adapter, what: str) -> None:
    (found,) = fixture.answers(engine, fixture.samples[:1], logprobs=True, lora=[name])
    off = _off(fixture, found, adapter.first)
    require(off <= TOLERANCE, f"{what}: the answer is {off:.2g} off the merged weights'")


@check("L3")
def _lora(fixture: Fixture) -> None:
    """An adapter does what merging it would do: every log-probability is within 1e-4 of the merged weights'."""
    every, half = _adapters(fixture)
    engine = fixture.engine(max_loras=2)
    for name, adapter in (("every", every), ("half", half)):
        engine.adapters.load(name, adapter.folder)
        _is_merged(fixture, engine, name, adapter, name)
    (plain,) = fixture.answers(engine, fixture.samples[:1], logprobs=True)
    for one, other in ((plain, every.first), (every.first, half.first)):
        require(_off(fixture, one, other) > DIFFERENCE, "the adapters change nothing: they prove nothing")


@check("L3")
def _lora_company(fixture: Fixture) -> None:
    """Two adapters and none in one batch are answered as each alone."""
    every, half = _adapters(fixture)
    engine = fixture.engine(max_loras=2, max_num_seqs=16, block_size=5, max_num_batched_tokens=11)
    engine.adapters.load("every", every.folder)
    engine.adapters.load("half", half.folder)
    _mixed(fixture, engine, every, half, "in one batch")


def _mixed(fixture: Fixture, engine: Engine, every: _Adapter, half: _Adapter, what: str) -> None:
    kinds = (("every", every.merged), (None, alone_answers(fixture)), ("half", half.merged))
    names = [name for _ in fixture.samples for name, _ in kinds]
    found = fixture.answers(engine, [sample for sample in fixture.samples for _ in kinds], lora=names)
    wanted = [answers[number] for number in range(len(fixture.samples)) for _, answers in kinds]
    for name, answer, want in zip(names, found, wanted, strict=True):
        is_same = answer.tokens == want.tokens[: len(answer.tokens)]
        if fixture.pools:
            is_same = float((answer.vectors - want.vectors).abs().max()) <= TOLERANCE
        require(is_same, f"{what}, a prompt with adapter {name} is answered differently")


@check("L3")
def _lora_identity(fixture: Fixture) -> None:
    """An adapter of zeros changes nothing."""
    _adapters(fixture)
    found = adapters.matrices(fixture.declared, fixture.folder, fixture.tensor_shapes())
    zeros = {module: (down, up * 0) for module, (down, up) in adapters.random_pairs(found, _RANK, 1).items()}
    engine = fixture.engine()
    folder = adapters.save(fixture.place("adapter-zeros"), zeros, _tables(found), _RANK, _ALPHA)
    engine.adapters.load("zeros", folder)
    plain, own = (
        fixture.answers(engine, fixture.samples[:1], logprobs=True, lora=[name])[0] for name in (None, "zeros")
    )
    require(_off(fixture, own, plain) <= TOLERANCE / 10, "an adapter of zeros changes the answer")


@check("L3")
def _lora_replaced(fixture: Fixture) -> None:
    """A name with new content never meets what the old one left; without its name an adapter is refused."""
    every, half = _adapters(fixture)
    engine = fixture.engine(block_size=4)
    for adapter in (every, half, every):
        engine.adapters.load("one", adapter.folder)
        _is_merged(fixture, engine, "one", adapter, "replaced")
    engine.adapters.unload("one")
    try:
        fixture.answers(engine, fixture.samples[:1], lora=["one"])
    except RequestError:
        pass
    else:
        raise AssertionError("an adapter that was unloaded is still served")
    alone = alone_answers(fixture)[0]
    (after,) = fixture.answers(engine, fixture.samples[:1])
    require(after.tokens == alone.tokens, "after an adapter was unloaded the model answers differently without one")


@check("L3")
def _lora_spread(fixture: Fixture) -> None:
    """Adapters do the same on ranks that share every matrix, in two stages."""
    every, half = _adapters(fixture)
    declared(fixture.declared, "pipeline")
    declared(fixture.declared, "tensor")

    def use(engine: Engine) -> None:
        engine.adapters.load("every", every.folder)
        engine.adapters.load("half", half.folder)
        _mixed(fixture, engine, every, half, "over stages of shards")

    spread(fixture, use, stages=2, shards=True, max_loras=2)
