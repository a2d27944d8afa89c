"""What users may write as a prompt, made into token ids. Knows no model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bestiary.errors import RequestError
from bestiary.text import Tokenizer

__all__ = ["ParsedPrompt", "parse_prompts"]

_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}
_MAX_SALT = 256


@dataclass(slots=True)
class ParsedPrompt:
    """A prompt as the engine takes it, and the text that it came from."""

    token_ids: list[int]
    text: str | None = None
    cache_salt: str = ""


def parse_prompts(prompts: Any, tokenizer: Tokenizer | None) -> list[ParsedPrompt]:
    """One prompt or many. Raises RequestError that names the prompt."""
    if isinstance(prompts, str | Mapping) or _is_token_ids(prompts):
        prompts = [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts are texts, lists of token ids or dictionaries, not {type(prompts).__name__}")
    return [_parse(i, prompt, tokenizer) for i, prompt in enumerate(prompts)]


def _is_token_ids(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], int)


def _parse(place: int, prompt: Any, tokenizer: Tokenizer | None) -> ParsedPrompt:
    if isinstance(prompt, str):
        return ParsedPrompt(_encode(place, prompt, tokenizer), prompt)
    if isinstance(prompt, Mapping):
        return _parse_mapping(place, prompt, tokenizer)
    if isinstance(prompt, Sequence):
        return ParsedPrompt(list(prompt))
    raise RequestError(f"prompt {place} is of type {type(prompt).__name__}: give a text, token ids or a dictionary")


def _parse_mapping(place: int, prompt: Mapping[str, Any], tokenizer: Tokenizer | None) -> ParsedPrompt:
    if unknown := sorted(set(prompt) - _KEYS, key=str):
        raise RequestError(
            f"prompt {place} has the key {unknown[0]!r}; these are understood: {', '.join(sorted(_KEYS))}"
        )
    salt = prompt.get("cache_salt") or ""
    if not isinstance(salt, str) or len(salt) > _MAX_SALT:
        raise RequestError(f"prompt {place}: cache_salt must be a text of at most {_MAX_SALT} characters")
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if ids is not None:
        if isinstance(ids, str) or not isinstance(ids, Sequence):
            raise RequestError(f"prompt {place}: prompt_token_ids must be a list of token ids")
        return ParsedPrompt(list(ids), text, salt)
    if not isinstance(text, str):
        raise RequestError(f"prompt {place} has neither a text under `prompt` nor ids under `prompt_token_ids`")
    return ParsedPrompt(_encode(place, text, tokenizer), text, salt)


def _encode(place: int, text: str, tokenizer: Tokenizer | None) -> list[int]:
    if tokenizer is None:
        raise RequestError(
            f"prompt {place} is a text, and there is no tokenizer (skip_tokenizer_init=True): give token ids"
        )
    return tokenizer.encode(text)
