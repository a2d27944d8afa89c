"""How decoders that others wrote are called: imported only when used, their errors made ours. Knows no format."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bestiary.errors import BestiaryError, CapabilityMissing, RequestError

__all__ = ["decoding", "extra", "kind_of"]

_MAX_REASON = 200


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around the imports of an optional dependency. Raises CapabilityMissing with the line that installs it."""
    try:
        yield
    except (ImportError, OSError) as error:  # OSError: a package without the shared library that it wraps
        line = f"pip install 'bestiary[{name}]'"
        raise CapabilityMissing(f"reading {name} needs a package that is not here ({error}): {line}") from error


@contextmanager
def decoding(what: str) -> Iterator[None]:
    """Around a decoder. Whatever it raises over a user's bytes is the fault of the bytes: RequestError."""
    try:
        yield
    except BestiaryError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:_MAX_REASON]
        raise RequestError(f"{what} cannot be decoded ({reason}): check that the file is whole") from error


def kind_of(data: bytes, signatures: Sequence[tuple[int, bytes, str]], what: str) -> str:
    """The format whose signature (offset, bytes, name) the data bears. Raises RequestError that lists the known.

    Asked before a library is: what it would guess from the content is wider than what is meant to be read.
    """
    for offset, magic, name in signatures:
        if data[offset : offset + len(magic)] == magic:
            return name
    known = ", ".join(dict.fromkeys(name for _, _, name in signatures))
    raise RequestError(f"{what} begins like no format that is read here: send one of {known}")
