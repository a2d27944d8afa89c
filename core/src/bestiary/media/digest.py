"""What an item is, in 32 bytes: equal content and equal options give equal digests, and nothing else does.

Knows no decoder. Caches are keyed by it, so a picture's size, mode and type count as much as its bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from hashlib import sha256
from struct import pack
from typing import Any, Protocol

__all__ = ["digest"]


class _Hash(Protocol):
    def update(self, data: Any, /) -> None: ...


def digest(
    kind: str, content: Any, *, decoding: Mapping[str, Any] | None = None, processor: Mapping[str, Any] | None = None
) -> bytes:
    """SHA-256 of a modality, its content, and the options of decoding and of the model's processor.

    `content` is a PIL image, `Audio`, `Video`, an array or bytes; options are what JSON can say, and arrays.
    Raises TypeError for anything else, so that nothing is left out in silence.
    """
    hasher = sha256()
    _feed(hasher, [kind, content, decoding or {}, processor or {}])
    return hasher.digest()


def _feed(hasher: _Hash, value: Any) -> None:
    """Every value is its tag and its parts, each with its length before it: no two different values read alike."""
    if value is None or isinstance(value, bool | int | float | str):
        _leaf(hasher, type(value).__name__, str(value).encode(errors="surrogatepass"))
    elif isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("the names of options must be texts")
        _leaf(hasher, "mapping", pack("<Q", len(value)))
        for key in sorted(value):
            _feed(hasher, key)
            _feed(hasher, value[key])
    elif is_dataclass(value):
        _leaf(hasher, "record", type(value).__name__.encode())
        _feed(hasher, {field.name: getattr(value, field.name) for field in fields(value)})
    elif isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        _leaf(hasher, "list", pack("<Q", len(value)))
        for item in value:
            _feed(hasher, item)
    elif hasattr(value, "getbands"):  # a PIL image, known by what it does: Pillow need not be here
        _leaf(hasher, "image", value.mode.encode(), pack("<2Q", *value.size), value.tobytes())
    else:
        _feed_buffer(hasher, memoryview(value))


def _feed_buffer(hasher: _Hash, view: memoryview) -> None:
    """An array, as bytes in C order, with its type and shape."""
    if "O" in view.format:
        raise TypeError("an array of Python objects has no content of its own")
    data = view.cast("B") if view.c_contiguous and view.nbytes else view.tobytes()
    _leaf(hasher, "array", view.format.encode(), pack(f"<{view.ndim}Q", *(view.shape or ())), data)


def _leaf(hasher: _Hash, tag: str, *parts: bytes | memoryview) -> None:
    hasher.update(pack("<Q", 1 + len(parts)))
    for part in (tag.encode(), *parts):
        hasher.update(pack("<Q", len(part)))
        hasher.update(part)
