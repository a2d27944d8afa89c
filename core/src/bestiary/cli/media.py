"""Pictures, sounds and videos that are named on a command line: read once, as the user's own. Knows no decoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bestiary.errors import RequestError

if TYPE_CHECKING:
    from bestiary.llm import LLM

__all__ = ["check_files", "in_prompt", "kinds_of", "question", "read_parts"]

#: A medium as it was named: its modality, and a file or an address.
Named = tuple[str, str]


def check_files(named: Sequence[Named]) -> None:
    """Raise RequestError for a file that is not there: better now than when the model is loaded."""
    for kind, place in named:
        if not _is_address(place) and not _is_file(place):
            raise RequestError(f"the {kind} {place!r} is no file: check the path")


def read_parts(llm: LLM, named: Sequence[Named], before: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The parts of a message that hold these media, as bytes.

    `before` are the modalities of those that the conversation has already. Raises RequestError where the model does not
    read them, or not so many, and where one of them cannot be read. A file is the user's own; addresses are fetched
    from the domains that are allowed.
    """
    from bestiary.media.sources import read

    admission = llm.engine.admission
    admission.check(Counter([*before, *(kind for kind, _ in named)]))
    parts = []
    for kind, place in named:
        source = place if _is_address(place) else Path(place)
        parts.append({"type": kind, kind: read(source, kind, admission.limits, admission.sources)})
    return parts


def question(text: str, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A user's message: its media first, then its text."""
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


def in_prompt(text: str, parts: Sequence[dict[str, Any]]) -> Any:
    """A prompt to complete, in which the text holds the placeholders."""
    data: dict[str, list[Any]] = {}
    for part in parts:
        data.setdefault(part["type"], []).append(part[part["type"]])
    return {"prompt": text, "multi_modal_data": data} if data else text


def kinds_of(turns: Sequence[dict[str, Any]]) -> list[str]:
    """The modalities of all media in a conversation."""
    contents = [turn["content"] for turn in turns if not isinstance(turn["content"], str)]
    return [part["type"] for content in contents for part in content if part["type"] != "text"]


def _is_file(place: str) -> bool:
    try:
        return Path(place).is_file()
    except OSError:  # a name that is too long, a folder that may not be read
        return False


def _is_address(place: str) -> bool:
    return place[:5].lower() in ("data:", "file:") or "://" in place
