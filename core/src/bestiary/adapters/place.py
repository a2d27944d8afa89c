"""Where in a model's tree an adapter's matrices stand. Knows neither files nor slots."""

from collections.abc import Callable, Mapping

from bestiary.adapters.peft import Adapter, Pair
from bestiary.blocks import Adaptable, Embedding, Leaf, Update
from bestiary.checkpoint import Names
from bestiary.errors import AdapterError, TensorMismatch

__all__ = ["place"]

#: Modules that an error lists.
_LISTED = 8


def place(
    adapter: Adapter, names: Names, leaves: Mapping[str, Leaf], elsewhere: Callable[[str], bool]
) -> dict[str, list[Update]]:
    """By path in the tree what is added there; nothing for places that another rank has.

    Raises AdapterError that names the modules, unless every module of the adapter is a matrix of the model.
    """
    found: dict[str, list[Update]] = {}
    unknown: list[str] = []
    for module, pair in adapter.pairs.items():
        target = names.find(f"{module}.weight")
        if target is None or target.path is None or target.stacked:
            unknown.append(module)
        elif (leaf := leaves.get(target.path)) is not None and _takes(leaf):
            rows = target.rows(pair.up, leaf)
            found.setdefault(target.path, []).extend(_updates(adapter, module, pair, leaf, rows, target.index))
        elif leaf is not None or not elsewhere(target.path):
            unknown.append(module)
    if unknown:
        known = "none of its modules" if len(unknown) == len(adapter.pairs) else f"{len(unknown)} of its modules not"
        more = f", ... ({len(unknown)} in all)" if len(unknown) > _LISTED else ""
        raise AdapterError(
            f"the adapter in {adapter.folder} does not fit this model, which knows {known}: "
            f"{', '.join(unknown[:_LISTED])}{more}. Is it an adapter of this model, and of its matrices alone?"
        )
    return found


def _takes(leaf: Leaf) -> bool:
    return isinstance(leaf, Embedding) or (isinstance(leaf, Adaptable) and leaf.takes_adapters)


def _updates(adapter: Adapter, module: str, pair: Pair, leaf: Leaf, rows: object, index: int | None) -> list[Update]:
    inputs, outputs = _sizes(leaf)
    try:
        pieces = list(rows)  # type: ignore[call-overload]
    except TensorMismatch as error:
        raise AdapterError(f"the adapter in {adapter.folder}: lora_B of {module}: {error}") from error
    sizes = {part: leaf.parts[part] if outputs is None else outputs for part, _ in pieces}
    if pair.down.shape[1] != inputs or any(up.shape[0] != sizes[part] for part, up in pieces):
        wanted = f"A [rank, {inputs}] and B [{sum(sizes.values())}, rank]"
        raise AdapterError(
            f"the adapter in {adapter.folder}: {module} has A {list(pair.down.shape)} and B {list(pair.up.shape)}, "
            f"and the model needs {wanted}"
        )
    return [Update(part, pair.down, up, index) for part, up in pieces]


def _sizes(leaf: Leaf) -> tuple[int, int | None]:
    """What goes into a leaf, and what comes out where that is not its parts' rows: of a table one of its columns."""
    if isinstance(leaf, Embedding):
        return leaf.vocabulary, leaf.width
    assert isinstance(leaf, Adaptable)
    return leaf.inputs, None
