"""The media of a conversation, in order, and the conversation without them. Fetches only when told; decodes nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bestiary.errors import RequestError
from bestiary.media.limits import MediaLimits
from bestiary.media.sources import Sources

__all__ = ["Medium", "collect", "fetch_all", "spelled_out"]

#: A part's type: its modality, and the keys under which its content may stand.
_PARTS = {
    "image_url": ("image", ("image_url",)),
    "image": ("image", ("image", "url")),
    "image_pil": ("image", ("image_pil",)),
    "input_audio": ("audio", ("input_audio",)),
    "audio_url": ("audio", ("audio_url",)),
    "audio": ("audio", ("audio", "url")),
    "video_url": ("video", ("video_url",)),
    "video": ("video", ("video", "url")),
}


@dataclass(frozen=True, slots=True)
class Medium:
    """One item as a message brings it. A text is an address or path that a stranger may have written."""

    kind: str
    source: Any
    #: For errors: "message 0, part 2".
    where: str


def collect(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Medium]]:
    """A conversation with plain parts ({"type": "image"}) for the chat template, and its media in order.

    Takes the parts that OpenAI, vLLM and transformers users write. A part that is plain already stays, and its item
    is expected beside the conversation. Raises RequestError for a part that is none of these, with its place.
    """
    plain, media = [], []
    for m, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None  # what it is, the template refuses
        if isinstance(content, Sequence) and not isinstance(content, str):
            parts = []
            for p, part in enumerate(content):
                medium = _read_part(part, f"message {m}, part {p}")
                parts.append(part if medium is None else {"type": medium.kind})
                if medium is not None and medium.source is not None:
                    media.append(medium)
            message = {**message, "content": parts}
        plain.append(dict(message) if isinstance(message, Mapping) else message)
    return plain, media


def spelled_out(messages: Sequence[Mapping[str, Any]], placeholders: Mapping[str, str]) -> list[dict[str, Any]]:
    """A plain conversation as texts alone: part by part in lines, each item by its placeholder."""
    found = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            lines = [placeholders.get(part["type"], part.get("text", "")) for part in content]
            message = {**message, "content": "\n".join(lines)}
        found.append(dict(message))
    return found


def fetch_all(media: Sequence[Medium], *, limits: MediaLimits, sources: Sources) -> dict[str, list[Any]]:
    """By modality, what the loaders take: bytes where the message had an address, else the object itself.

    Count them before (`check_counts`), so that nobody makes us fetch a thousand. Raises RequestError with the place.
    """
    found: dict[str, list[Any]] = {}
    for medium in media:
        try:
            # Here, not in the loader: a path of a message is not a path of the Python caller.
            is_text = isinstance(medium.source, str)
            item = sources.fetch(medium.source, medium.kind, limits) if is_text else medium.source
        except RequestError as error:
            raise RequestError(f"{medium.where}: {error}") from error
        found.setdefault(medium.kind, []).append(item)
    return found


def _read_part(part: Any, where: str) -> Medium | None:
    """None for a part of text, or of a type that others know."""
    if not isinstance(part, Mapping):
        return None
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _PARTS:
        return None
    modality, keys = _PARTS[kind]
    if unknown := sorted(set(part) - {"type", *keys}, key=str):
        raise RequestError(f"{where}: it has the key {unknown[0]!r}; these are understood: type, {', '.join(keys)}")
    values = [part[key] for key in keys if part.get(key) is not None]
    if len(values) > 1 or (not values and kind != modality):
        raise RequestError(f"{where}: it must have one content, under {' or '.join(map(repr, keys))}")
    return Medium(modality, _source(values[0], kind, where) if values else None, where)


def _source(value: Any, kind: str, where: str) -> Any:
    """What stands inside the objects of OpenAI's interface; anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    if kind == "input_audio":
        data, form = value.get("data"), value.get("format", "wav")
        if isinstance(data, str) and isinstance(form, str) and form.isalnum() and set(value) <= {"data", "format"}:
            return f"data:audio/{form};base64,{data}"
        raise RequestError(f"{where}: input_audio must be {{'data': base64, 'format': 'wav' or another}}")
    if not isinstance(value.get("url"), str) or not set(value) <= {"url", "detail"}:
        raise RequestError(f"{where}: {kind} must be {{'url': address}}")
    if value.get("detail", "auto") != "auto":
        raise RequestError(f"{where}: detail is {value['detail']!r}; the model settles it, so leave it out or 'auto'")
    return value["url"]
