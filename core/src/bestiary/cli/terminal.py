"""What the verbs write, and how: text that no terminal obeys, aligned columns, numbers with units. Knows no verb."""

import json
import re
import sys
from collections.abc import Sequence
from typing import Any, TextIO

__all__ = ["StreamedText", "UsageError", "columns", "note", "one_line", "print_json", "prose", "size", "stored"]

#: Control characters except the tab and the line feed: they start escape sequences, or move the cursor back.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class UsageError(Exception):
    """Arguments that cannot be meant together. The program ends with status 2."""


def one_line(text: str) -> str:
    """A name that somebody else chose, on one line: whatever is not printable stands as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def prose(text: str) -> str:
    """A text of several lines that somebody else wrote, without anything that a terminal would obey."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def note(text: str) -> None:
    """Tell the user something that is not the result."""
    print(prose(text), file=sys.stderr, flush=True)


def size(size_bytes: float) -> str:
    """A size for people, with three digits that count."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size_bytes < 1024 or unit == "GiB":
            break
        size_bytes /= 1024
    return f"{size_bytes:,.0f} {unit}" if size_bytes >= 100 or unit == "bytes" else f"{size_bytes:.3g} {unit}"


def stored(dtype: str, quantization: str | None) -> str:
    """How a model's numbers are stored."""
    return dtype if quantization is None else f"{dtype}, the layers' matrices in {quantization}"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of aligned columns, two spaces apart, each cell whole."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def print_json(value: Any) -> None:
    """Write a result for programs. Pure ASCII, so that nothing in it reaches a terminal as it is."""
    print(json.dumps(value, indent=2))


class StreamedText:
    """Writes a text that grows, each character once and at once; a terminal gets it without control characters."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._is_terminal = stream, stream.isatty()
        self._num_written = 0
        self._last = ""

    def update(self, text: str) -> None:
        """Write what `text` has beyond what was written."""
        new = text[self._num_written :]
        if new:
            self._stream.write(prose(new) if self._is_terminal else new)
            self._stream.flush()
            self._num_written, self._last = len(text), new[-1]

    def end(self) -> None:
        """End the last line, if it is not ended."""
        if self._last != "\n":
            self._stream.write("\n")
            self._stream.flush()
