"""A checkpoint's chat template: a conversation to the prompt that the model was trained on. Knows no tokenizer.

Templates are Jinja programs that come with checkpoints. They are rendered in a process of their own, within limits of
time and memory (`bestiary.text.worker`), in the dialect that checkpoints are written for: blocks trimmed, loop
controls, `raise_exception`, `strftime_now`, and a `tojson` that does not escape for HTML.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bestiary.errors import CheckpointMalformed, RequestError
from bestiary.text.special import read_optional, special_tokens, tokenizer_config
from bestiary.text.worker import Worker

__all__ = ["ChatTemplate"]

#: One process renders every template; it starts with the first render, or with `ChatTemplate.warm`.
_worker = Worker()


class ChatTemplate:
    """Turns conversations into prompts; safe to share between threads.

    `template` is Jinja source, or several by name, of which `tool_use` is taken where tools are given and `default`
    otherwise. `special` holds the named tokens (`bos_token`, ...) that templates write.
    """

    def __init__(self, template: str | Mapping[str, str], special: Mapping[str, str] | None = None) -> None:
        self.templates = {"default": template} if isinstance(template, str) else dict(template)
        self.special = dict(special or {})

    @classmethod
    def load(cls, folder: Path) -> "ChatTemplate | None":
        """Reads the template of the checkpoint in a folder; None where it has none, as base models have not.

        It is looked for in `chat_template.jinja`, then in `tokenizer_config.json`, then in `chat_template.json`.
        Raises CheckpointMalformed for a file that cannot be read; a template is compiled when it is first rendered.
        """
        config = tokenizer_config(folder)
        templates = _template_files(folder)
        for name, holder in (("tokenizer_config.json", config), ("chat_template.json", None)):
            if not templates:
                found = read_optional(folder / name) if holder is None else holder
                templates = _named(found.get("chat_template"), folder / name)
        return cls(templates, special_tokens(config)) if templates else None

    @staticmethod
    def warm() -> None:
        """Starts the process that renders, so that the first render need not wait for it. Returns at once."""
        _worker.warm()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Returns the prompt of a conversation, a list of `{"role": ..., "content": ...}`.

        A content is a text, a list of parts, or None. `variables` are those that the template itself reads, such as
        `enable_thinking`; any other is refused, and so are tools where the template has no place for them. The text
        holds its control tokens already: encode it with `add_special_tokens=False`.

        Raises RequestError that names the message, CheckpointMalformed for a template that is wrong in itself.
        """
        asked = dict(variables) if tools is None else {**variables, "tools": _checked_tools(tools)}
        return _worker.render(
            {
                "template": self._choose(tools is not None),
                "messages": _checked(messages),
                "given": {**self.special, "add_generation_prompt": add_generation_prompt},
                "asked": asked,
            }
        )

    def _choose(self, has_tools: bool) -> str:
        name = "tool_use" if has_tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise CheckpointMalformed(
                f"the checkpoint has chat templates named {', '.join(sorted(self.templates))}, and none for this "
                "conversation: give the one that fits with chat_template="
            )
        return self.templates[name]


def _template_files(folder: Path) -> dict[str, str]:
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    found = {}
    for name, file in files.items():
        try:
            found[name] = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointMalformed(f"{file} cannot be read as text ({error}); download it again") from error
    return found


def _named(value: Any, file: Path) -> dict[str, str]:
    """Returns the templates that a JSON file has under `chat_template`: a text, or a list of named ones."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        named = {entry["name"]: entry["template"] for entry in value}
        if all(isinstance(text, str) for pair in named.items() for text in pair):
            return named
    except (TypeError, KeyError):
        pass
    raise CheckpointMalformed(f"chat_template in {file} must be a text, or a list of objects with name and template")


def _checked(messages: Any) -> list[dict[str, Any]]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise RequestError('messages must be a list of {"role": ..., "content": ...}, with one at least')
    return [_checked_message(f"messages[{place}]", message) for place, message in enumerate(messages)]


def _checked_tools(tools: Any) -> list[dict[str, Any]]:
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RequestError('tools must be a list of objects, such as {"type": "function", "function": {...}}')
    return [dict(tool) for tool in tools]


def _checked_message(place: str, message: Any) -> dict[str, Any]:
    """Returns a message without the keys that are None: templates ask whether a key is there."""
    if not isinstance(message, Mapping):
        raise RequestError(f"{place} is of type {type(message).__name__}: it must be an object with role and content")
    if not isinstance(message.get("role"), str):
        raise RequestError(f'{place} has no role: give it one, such as "user"')
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        if not isinstance(content, Sequence) or isinstance(content, bytes):
            raise RequestError(f"{place}.content must be a text or a list of parts, not {type(content).__name__}")
        for index, part in enumerate(content):
            _check_part(f"{place}.content[{index}]", part)
    return {str(key): value for key, value in message.items() if value is not None}


def _check_part(place: str, part: Any) -> None:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise RequestError(f'{place} must be an object with a type, such as {{"type": "text", "text": ...}}')
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        raise RequestError(f"{place} is a text part without a text")
