"""JSON that somebody else wrote, read as data: bounded in size and depth, no key twice. Knows not what keys mean."""

import json
import reprlib
from itertools import pairwise
from pathlib import Path
from typing import Any

from bestiary.errors import CheckpointMalformed, CheckpointNotFound

__all__ = ["parse_object", "read_object", "shown"]

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 200
_repr.maxlist = _repr.maxtuple = 8


def shown(value: Any) -> str:
    """`repr` for error messages: bounded in length and depth, whatever the value is."""
    return _repr.repr(value)


def parse_object(data: bytes, source: str) -> dict[str, Any]:
    """Return the JSON object that `data` spells in UTF-8; `source` names it in errors.

    Raises CheckpointMalformed for anything else: broken JSON, a key that stands twice in one object, or nesting deeper
    than the interpreter's stack.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise CheckpointMalformed(f"{source} is nested too deeply to be read; download it again") from None
    except ValueError as error:
        raise CheckpointMalformed(f"{source} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointMalformed(f"{source} must be a JSON object, not {shown(value)}; download it again")
    return value


def read_object(file: Path, limit_bytes: int) -> dict[str, Any]:
    """Return the JSON object in a regular file of at most `limit_bytes`.

    Raises CheckpointNotFound where there is no such file or it may not be read, CheckpointMalformed as `parse_object`.
    """
    try:
        # Asked first, because opening a FIFO would wait for its writer.
        if not file.is_file():
            raise CheckpointNotFound(f"{file} does not exist or is not a file; check the model's folder")
        with file.open("rb") as stream:
            data = stream.read(limit_bytes + 1)
    except OSError as error:
        raise CheckpointNotFound(f"{file} cannot be read ({error.strerror}); check its path and permissions") from error
    if len(data) > limit_bytes:
        raise CheckpointMalformed(f"{file} has more than {limit_bytes:,} bytes, which no such file needs")
    return parse_object(data, str(file))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = sorted(key for key, _ in pairs)
        twice = next(key for key, after in pairwise(keys) if key == after)
        raise ValueError(f"the key {shown(twice)} stands twice in one object")
    return found
