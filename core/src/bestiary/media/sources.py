"""Where media come from: bytes, files, `data:` and web addresses, each read within its bounds. Knows no format.

A plain path or bytes are the Python caller's own affair. A text out of a request goes through `Sources.fetch`, which
reads nothing that the operator did not allow.
"""

import os
from base64 import b64decode
from collections.abc import Collection
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from bestiary.errors import RequestError, SettingError
from bestiary.media import web
from bestiary.media.limits import MediaLimits

__all__ = ["Sources", "read"]


@dataclass(frozen=True, slots=True)
class Sources:
    """What may be fetched for a request. With nothing set: `data:` addresses alone."""

    #: Hosts that http(s) addresses may name, exactly, whatever the port; redirects and addresses are checked too.
    allowed_media_domains: Collection[str] = ()
    #: The folder below which a request may name files.
    allowed_local_media_path: str | PathLike[str] | None = None
    #: Let the allowed hosts stand in a private network.
    allow_private_media_addresses: bool = False
    #: Seconds for one address, redirects included.
    media_fetch_timeout: float = 10.0

    def __post_init__(self) -> None:
        if isinstance(self.allowed_media_domains, str):
            raise SettingError("allowed_media_domains is one text: give a list of host names")
        if not self.media_fetch_timeout > 0:
            raise SettingError(f"media_fetch_timeout is {self.media_fetch_timeout!r}: give seconds above 0")

    def fetch(self, url: str, kind: str, limits: MediaLimits) -> bytes:
        """The bytes behind an address, or behind a path, that a request names.

        `kind` is "image", "audio" or "video". Raises RequestError where it is not allowed, not there or too large.
        """
        scheme, colon, rest = url.partition(":")
        match scheme.lower() if colon else "":
            case "data":
                return _decode_data_url(rest, kind, limits)
            case "http" | "https":
                return self._fetch_web(url, kind, limits)
            case "file":
                return self._read_local(unquote(_file_path(url)), kind, limits)
            case _ if "://" in url:
                raise RequestError(f"the {kind}'s address {_shown(url)} is none of data:, https:, http:, file:")
            case _:
                return self._read_local(url, kind, limits)

    def _fetch_web(self, url: str, kind: str, limits: MediaLimits) -> bytes:
        name = f"max_{kind}_bytes"
        body = web.fetch(
            url,
            self.allowed_media_domains,
            private=self.allow_private_media_addresses,
            timeout=self.media_fetch_timeout,
            max_bytes=getattr(limits, name),
        )
        limits.check(name, len(body), f"the {kind}")
        return body

    def _read_local(self, path: str, kind: str, limits: MediaLimits) -> bytes:
        """One answer for all that may not be read, so that nobody learns what exists outside the folder."""
        if self.allowed_local_media_path is None:
            raise RequestError(
                f"the {kind} {_shown(path)} is a file, and requests may not name files: "
                f"send a data: address, or set allowed_local_media_path"
            )
        root = Path(self.allowed_local_media_path).resolve()
        try:
            real = (root / path).resolve(strict=True)
            allowed = real.is_relative_to(root) and real.is_file()
        except (OSError, ValueError, RuntimeError):  # not there, a NUL in it, a loop of links
            allowed = False
        if not allowed:
            raise RequestError(f"the {kind} {_shown(path)} is no file below allowed_local_media_path")
        return _read_file(real, kind, limits)


def read(source: Any, kind: str, limits: MediaLimits, sources: Sources) -> bytes:
    """The bytes of what a Python caller gave: bytes, a path, or an address. Raises RequestError."""
    match source:
        case bytes() | bytearray() | memoryview():
            limits.check(f"max_{kind}_bytes", memoryview(source).nbytes, f"the {kind}")
            return bytes(source)
        case str() if source[:5].lower() in ("data:", "file:") or "://" in source:
            return sources.fetch(source, kind, limits)
        case str() | PathLike():
            return _read_file(Path(source), kind, limits)
        case _:
            raise RequestError(f"the {kind} is a {type(source).__name__}, which is no form that is read here")


def _read_file(path: Path, kind: str, limits: MediaLimits) -> bytes:
    name = f"max_{kind}_bytes"
    try:
        if not path.is_file():  # a pipe or a device would never end
            raise RequestError(f"the {kind} {_shown(os.fspath(path))} is no file: check the path")
        limits.check(name, path.stat().st_size, f"the {kind}")
        with path.open("rb") as file:
            data = file.read(int(getattr(limits, name)) + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"the {kind} {_shown(os.fspath(path))} cannot be read: check the path") from error
    limits.check(name, len(data), f"the {kind}")
    return data


def _file_path(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise RequestError(f"the address {_shown(url)} names a host: a file: address here has none")
    return parts.path


def _decode_data_url(rest: str, kind: str, limits: MediaLimits) -> bytes:
    """What stands after `data:` (RFC 2397)."""
    head, comma, body = rest.partition(",")
    media_type, *parameters = head.split(";")
    if not comma:
        raise RequestError(f"the {kind}'s data: address has no comma before its data")
    if media_type.partition("/")[0].strip().lower() not in ("", kind, "application"):
        raise RequestError(f"the {kind}'s data: address says that it is {_shown(media_type)}: send {kind}/...")
    name, in_base64 = f"max_{kind}_bytes", "base64" in (p.strip().lower() for p in parameters)
    # Before it is decoded: base64 has three bytes in four characters.
    limits.check(name, len(body) * 3 // 4 - 2 if in_base64 else len(body) // 3, f"the {kind}")
    try:
        data = b64decode(body, validate=True) if in_base64 else unquote_to_bytes(body)
    except ValueError as error:
        raise RequestError(f"the {kind}'s data: address is not valid base64 ({error})") from error
    limits.check(name, len(data), f"the {kind}")
    return data


def _shown(text: str) -> str:
    """A user's text as an error may repeat it: escaped, and short."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
