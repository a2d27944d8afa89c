"""The program that renders chat templates, in a process of its own. Knows no other module of Bestiary.

A template comes with a checkpoint, so it may be hostile: loop for ever, ask for a gigabyte, climb from an object to
Python's builtins. Jinja's sandbox stops the last, and what it misses finds a process without files, without memory to
waste, without a secret in its environment, and with a second of processor time (`bestiary.text.worker`).

It is run by its path with `python -I -S`, the folders of its imports as arguments. Each request and each reply is
four bytes of length and a JSON object; a reply holds `text`, or `fault` (whose: "template" or "request") and `reason`.
"""

import json
import os
import resource
import signal
import struct
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO, NoReturn

if __name__ == "__main__":
    sys.path.extend(sys.argv[1:])

import jinja2
import jinja2.constants
import jinja2.debug
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["MAX_CHARS", "answer", "main"]

#: No prompt is longer than this; a render that wrote more has failed.
MAX_CHARS = 4 * 2**20
_MEMORY_BYTES = 512 * 2**20
#: What the caller may not set through variables: they have arguments of their own.
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})
_PROBE = "bestiary-probe"
_MAX_REASON = 500


class _Refused(jinja2.TemplateError):
    """The template's own `raise_exception`: it does not take this conversation."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant said, for training; here it is a plain block."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which a model has never seen.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


_ENVIRONMENT = _environment()


@dataclass(frozen=True)
class _Template:
    """A template that was compiled, and the names of the variables that it reads."""

    compiled: jinja2.Template
    reads: frozenset[str]

    def render(self, variables: dict[str, Any]) -> str:
        pieces, length = [], 0
        for piece in self.compiled.generate(variables):
            length += len(piece)
            if length > MAX_CHARS:
                raise ValueError(f"it wrote more than {MAX_CHARS:,} characters")
            pieces.append(piece)
        return "".join(pieces)

    def takes_parts(self, variables: dict[str, Any]) -> bool:
        """Does the template look into a content that is a list of parts, or print it as Python would?"""
        messages = [{"role": "user", "content": [{"type": "text", "text": _PROBE}]}]
        try:
            text = self.render({**variables, "messages": messages})
        except Exception:  # it cannot handle the list, by whatever error it came to notice
            return False
        return _PROBE in text and "'type'" not in text and '"type"' not in text


@lru_cache(maxsize=16)
def _prepare(source: str) -> _Template:
    reads = jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(source))
    return _Template(_ENVIRONMENT.from_string(source), frozenset(reads) - set(_ENVIRONMENT.globals))


def answer(request: dict[str, Any]) -> dict[str, str]:
    """Renders one request: `template`, `messages`, `given` (variables set for every chat) and `asked` (by the caller).

    Every variable that was asked for must be one that the template reads. Returns the reply, never raises.
    """
    try:
        template = _prepare(request["template"])
    except Exception as error:
        return {"fault": "template", "reason": _reason(error)}
    try:
        _check_asked(template, request)
        variables = {"tools": None, "documents": None, **request["given"], **request["asked"]}
        variables["messages"] = _shaped(template, variables, request["messages"])
        return {"text": template.render(variables)}
    except SecurityError as error:
        return {"fault": "template", "reason": _reason(error)}
    except Exception as error:
        return {"fault": "request", "reason": _reason(error)}


def _check_asked(template: _Template, request: dict[str, Any]) -> None:
    allowed = {name for name in template.reads - _RESERVED - set(request["given"]) if not name.startswith("_")}
    for name in request["asked"]:
        if name == "tools" and name not in template.reads:
            raise ValueError("this model's template has no place for tools")
        if name != "tools" and name not in allowed:
            known = ", ".join(sorted(allowed)) or "none"
            raise ValueError(f"{name!r} is no variable that this template lets a caller set; it has: {known}")


def _shaped(template: _Template, variables: dict[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Joins text parts by newlines, for a template that knows only strings."""
    in_parts = [place for place, message in enumerate(messages) if isinstance(message.get("content"), list)]
    if not in_parts or template.takes_parts(variables):
        return messages
    shaped = list(messages)
    for place in in_parts:
        parts = messages[place]["content"]
        if other := next((part["type"] for part in parts if part["type"] != "text"), None):
            raise ValueError(f"messages[{place}] has a part of type {other!r}, and this template takes text only")
        shaped[place] = {**messages[place], "content": "\n".join(part["text"] for part in parts)}
    return shaped


def _reason(error: Exception) -> str:
    words = str(error) if isinstance(error, _Refused | ValueError) else f"{type(error).__name__}: {error}"
    line = getattr(error, "lineno", None)
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == "<template>":
            line = number
    return words[:_MAX_REASON] if line is None else f"line {line}: {words[:_MAX_REASON]}"


def _confine() -> None:
    """Gives up what a renderer does not need, for good."""
    limits = [
        (resource.RLIMIT_AS, _MEMORY_BYTES),
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ]
    for limit, value in limits:
        with suppress(ValueError, OSError):  # not every system has every limit; the parent's clock stays
            resource.setrlimit(limit, (value, value))


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answers until the parent closes its end."""
    replies.write(struct.pack(">I", 0))
    replies.flush()
    while header := requests.read(4):
        request = json.loads(requests.read(struct.unpack(">I", header)[0]))
        # Processor time, so that a busy machine makes no difference; the kernel ends the process, whatever it is in.
        signal.setitimer(signal.ITIMER_PROF, request["limit_s"])
        reply = json.dumps(answer(request)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(struct.pack(">I", len(reply)) + reply)
        replies.flush()


def main() -> None:
    """Serves on standard input and output, confined."""
    # What Python and Jinja load only when it is wanted, while files can still be opened.
    _prepare(r"{{ '\u00e9' }}{{ strftime_now('%Z') }}{{ [1] | pprint | wordwrap }}").render({})
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    _confine()
    _serve(requests, replies)


if __name__ == "__main__":
    main()
