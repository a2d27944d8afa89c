"""What concerns pictures, sounds and videos: that they matter, and that the way they come in does not."""

from typing import Any

from bestiary.engine import Engine
from bestiary.errors import RequestError
from bestiary.prompts import ParsedPrompt, parse_prompts
from bestiary.testing.checklist import NotApplicable, check, require
from bestiary.testing.checks import DIFFERENCE
from bestiary.testing.fixture import Fixture
from bestiary.testing.invariants import alone_answers, same
from bestiary.testing.samples import Sample

__all__: list[str] = []


def _modalities(fixture: Fixture) -> dict[str, Any]:
    architecture = fixture.engine().architecture
    assert architecture is not None
    if not architecture.modalities:
        raise NotApplicable("it reads text alone")
    return dict(architecture.modalities)


@check("L2")
def _items_matter(fixture: Fixture) -> None:
    """With another picture, sound or video of the same size the answer is another one."""
    declared, engine = _modalities(fixture), fixture.engine(enable_prefix_caching=False)
    shown: set[str] = set()
    for sample, answer in zip(fixture.samples, alone_answers(fixture), strict=True):
        if not sample.media:
            continue
        shown |= {name for name, items in sample.media.items() if items}
        own, other = fixture.answers(engine, [sample, sample.altered()], logprobs=True)
        require(own.tokens[: len(answer.tokens)] == answer.tokens, "the same prompt is answered in two ways")
        off = float((own.logprobs[0] - other.logprobs[0]).abs().max())
        require(off > DIFFERENCE, f"{', '.join(sample.media)}: another item changes the answer by {off:.2g} only")
    require(shown >= set(declared), f"no prompt of the case brings {', '.join(sorted(set(declared) - shown))}")
    require(any(not sample.media for sample in fixture.samples), "no prompt of the case is text alone")


@check("L3")
def _item_counts(fixture: Fixture) -> None:
    """As many items as the declaration and the settings allow, and an error for one more."""
    for modality, declared in _modalities(fixture).items():
        most = max(len(sample.media.get(modality, ())) for sample in fixture.samples)
        sample = next(s for s in fixture.samples if len(s.media.get(modality, ())) == most)
        require(not declared.many or most > 1, f"it declares several items of {modality}; no prompt brings them")
        engine = fixture.engine(limit_mm_per_prompt={modality: most})
        fixture.answers(engine, [sample])
        item = sample.media[modality][0]
        crowd = Sample(sample.token_ids, {**sample.media, modality: [item] * (most + 1)})
        _refused(fixture, engine, crowd.prompt(), f"{most + 1} items of {modality}")


@check("L3")
def _bad_items(fixture: Fixture) -> None:
    """What is no item, or has no place in the prompt, is an error; the engine serves on."""
    engine = fixture.engine(enable_prefix_caching=False)
    for modality in _modalities(fixture):
        sample = next(s for s in fixture.samples if s.media.get(modality))
        for what, item in (("a text file", b"no such thing"), ("an object", object())):
            broken = {**sample.prompt(), "multi_modal_data": {**sample.media, modality: [item]}}
            _refused(fixture, engine, broken, f"{what} as {modality}")
        _refused(fixture, engine, {"prompt_token_ids": list(sample.token_ids)}, f"a placeholder without its {modality}")
    same(fixture, fixture.answers(engine, fixture.samples), "after bad items")


@check("L3")
def _undeclared_items(fixture: Fixture) -> None:
    """A modality that is not declared is refused, naming it."""
    engine = fixture.engine()
    declared = engine.architecture.modalities if engine.architecture else {}
    for modality in ("image", "video", "audio"):
        if modality not in declared:
            prompt = {"prompt_token_ids": [5], "multi_modal_data": {modality: [0]}}
            _refused(fixture, engine, prompt, modality)


def _refused(fixture: Fixture, engine: Engine, prompt: dict[str, Any], what: str) -> None:
    try:
        parse_prompts(prompt, None, engine.processor, engine.admission)
    except RequestError:
        return
    raise AssertionError(f"{what} is not refused")


@check("L3")
def _encoded_again(fixture: Fixture) -> None:
    """An item whose vectors were kept gives the same answer as one that is encoded for it."""
    _modalities(fixture)
    engine = fixture.engine(enable_prefix_caching=False)
    fixture.answers(engine, fixture.samples)
    known = fixture.answers(engine, fixture.samples)
    same(fixture, known, "with vectors that were kept")
    _runner(engine).encoding.forget()
    same(fixture, fixture.answers(engine, fixture.samples), "encoded again")


@check("L3")
def _embeddings(fixture: Fixture) -> None:
    """Ready embeddings give the answer of the items that they were made of, where they are declared; else an error."""
    declared, engine = _modalities(fixture), fixture.engine(enable_prefix_caching=False)
    for sample, alone in zip(fixture.samples, alone_answers(fixture), strict=True):
        if not sample.media:
            continue
        parsed = fixture.parsed(engine, sample)
        embeds = _as_embeddings(fixture, engine, parsed)
        prompt = {"prompt_token_ids": list(sample.token_ids), "multi_modal_embeds": embeds}
        if not all(declared[name].embeddings for name in sample.media):
            _refused(fixture, engine, prompt, f"embeddings of {', '.join(sample.media)}")
            continue
        (ready,) = parse_prompts(prompt, None, engine.processor, engine.admission)
        (found,) = fixture.answers(engine, [ready])
        require(found.tokens == alone.tokens, f"embeddings of {', '.join(sample.media)} are answered differently")
        for what, bad in _bad_embeddings(embeds):
            _refused(fixture, engine, {**prompt, "multi_modal_embeds": bad}, what)


def _runner(engine: Engine) -> Any:
    return engine.executor.runner  # type: ignore[attr-defined]


def _as_embeddings(fixture: Fixture, engine: Engine, parsed: ParsedPrompt) -> dict[str, Any]:
    """The vectors of a prompt's items, in the form in which a user gives them."""
    items = parsed.inputs.items
    vectors = [_runner(engine).encode(item).clone() for item in items]
    if fixture.case.embeddings is not None:
        return dict(fixture.case.embeddings(items, vectors))
    found: dict[str, Any] = {}
    for item, value in zip(items, vectors, strict=True):
        found.setdefault(item.modality, []).append(value)
    return found


def _bad_embeddings(embeds: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Of a list of vectors: too narrow, of whole numbers, not a number, sparse."""
    name, given = next(iter(embeds.items()))
    if not isinstance(given, list):
        return []
    first = given[0]
    wrong = {
        "vectors that are too narrow": first[:, 1:],
        "vectors of whole numbers": first.long(),
        "vectors that are no numbers": first * float("nan"),
        "sparse vectors": first.to_sparse(),
        "a row of numbers": first[0],
    }
    return [(what, {**embeds, name: [bad, *given[1:]]}) for what, bad in wrong.items()]
