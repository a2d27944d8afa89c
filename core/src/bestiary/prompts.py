"""What users may write as a prompt, made into token ids, and into inputs where it brings more. Knows no model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bestiary.errors import RequestError
from bestiary.inputs import NOTHING, Inputs
from bestiary.text import Tokenizer

__all__ = ["ParsedPrompt", "Processor", "Prompt", "parse_prompts"]

_TEXT_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}
_MORE_KEYS = {"multi_modal_data", "multi_modal_embeds", "encoder_prompt", "decoder_prompt"}
_MAX_SALT = 256


@dataclass(slots=True)
class Prompt:
    """A prompt as the user wrote it: text or token ids, and what comes with it."""

    text: str | None = None
    token_ids: list[int] | None = None
    #: By modality what is to be encoded, and what is encoded already.
    media: Mapping[str, Any] = field(default_factory=dict)
    embeddings: Mapping[str, Any] = field(default_factory=dict)
    #: What an encoder reads; text and token ids are then the beginning of the answer.
    encoder: "Prompt | None" = None

    def tokens(self, tokenizer: Tokenizer | None, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids, as given or of the text. Raises RequestError for a text without a tokenizer."""
        if self.token_ids is not None:
            return self.token_ids
        if tokenizer is None:
            raise RequestError("it is a text, and there is no tokenizer (skip_tokenizer_init=True): give token ids")
        return tokenizer.encode(self.text or "", add_special_tokens=add_special_tokens)


class Processor(Protocol):
    """A plugin's own way from a prompt to tokens and inputs."""

    def __call__(self, prompt: Prompt) -> tuple[list[int], Inputs]:
        """Raises RequestError, without naming the prompt, for one that cannot be served."""


@dataclass(slots=True)
class ParsedPrompt:
    """A prompt as the engine takes it, and the text that it came from."""

    token_ids: list[int]
    text: str | None = None
    cache_salt: str = ""
    inputs: Inputs = NOTHING


def parse_prompts(prompts: Any, tokenizer: Tokenizer | None, processor: Processor | None = None) -> list[ParsedPrompt]:
    """One prompt or many. Raises RequestError that names the prompt."""
    if isinstance(prompts, str | Mapping) or _is_token_ids(prompts):
        prompts = [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts are texts, lists of token ids or dictionaries, not {type(prompts).__name__}")
    return [_parse(i, prompt, tokenizer, processor) for i, prompt in enumerate(prompts)]


def _is_token_ids(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], int)


def _parse(place: int, given: Any, tokenizer: Tokenizer | None, processor: Processor | None) -> ParsedPrompt:
    try:
        prompt, salt = _read(given), _salt(given)
        if processor is not None:
            token_ids, inputs = processor(prompt)
            return ParsedPrompt(token_ids, prompt.text, salt, inputs)
        if prompt.media or prompt.embeddings or prompt.encoder is not None:
            raise RequestError("it brings more than text, and the model reads text alone")
        return ParsedPrompt(prompt.tokens(tokenizer), prompt.text, salt)
    except RequestError as error:
        raise RequestError(f"prompt {place}: {error}") from error


def _salt(given: Any) -> str:
    salt = (given.get("cache_salt") if isinstance(given, Mapping) else None) or ""
    if not isinstance(salt, str) or len(salt) > _MAX_SALT:
        raise RequestError(f"cache_salt must be a text of at most {_MAX_SALT} characters")
    return salt


def _read(given: Any) -> Prompt:
    """What the user wrote, whichever of the forms it has."""
    if isinstance(given, str):
        return Prompt(text=given)
    if isinstance(given, Mapping):
        return _read_mapping(given)
    if isinstance(given, Sequence):
        return Prompt(token_ids=list(given))
    raise RequestError(f"it is of type {type(given).__name__}: give a text, token ids or a dictionary")


def _read_mapping(given: Mapping[str, Any]) -> Prompt:
    known = _TEXT_KEYS | _MORE_KEYS
    if unknown := sorted(set(given) - known, key=str):
        raise RequestError(f"it has the key {unknown[0]!r}; these are understood: {', '.join(sorted(known))}")
    if (encoder := given.get("encoder_prompt")) is not None:
        decoder = given.get("decoder_prompt")
        prompt = Prompt() if decoder is None else _read(decoder)
        prompt.encoder = _read(encoder)
        return prompt
    text, ids = given.get("prompt"), given.get("prompt_token_ids")
    if ids is not None and (isinstance(ids, str) or not isinstance(ids, Sequence)):
        raise RequestError("prompt_token_ids must be a list of token ids")
    if ids is None and not isinstance(text, str):
        raise RequestError("it has neither a text under `prompt` nor ids under `prompt_token_ids`")
    return Prompt(
        text,
        None if ids is None else list(ids),
        given.get("multi_modal_data") or {},
        given.get("multi_modal_embeds") or {},
    )
