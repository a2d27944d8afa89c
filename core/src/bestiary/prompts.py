"""What users may write as a prompt, made into token ids, and into inputs where it brings more. Knows no model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bestiary.errors import RequestError
from bestiary.inputs import NOTHING, Inputs
from bestiary.media import Admission, Attachment
from bestiary.text import Tokenizer

__all__ = ["TEXT_ALONE", "ParsedPrompt", "Processor", "Prompt", "parse_prompts", "process"]

_TEXT_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}
_MORE_KEYS = {"multi_modal_data", "multi_modal_embeds", "encoder_prompt", "decoder_prompt"}
_MAX_SALT = 256
TEXT_ALONE = Admission()


@dataclass(slots=True)
class Prompt:
    """A prompt as the user wrote it: text or token ids, and what comes with it."""

    text: str | None = None
    token_ids: list[int] | None = None
    #: By modality what is to be encoded, and what is encoded already: a list of vectors, or a plugin's own form.
    media: Mapping[str, Sequence[Attachment]] = field(default_factory=dict)
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
    """A plugin's own way from a prompt to tokens and inputs.

    It may have `placeholders`, by modality what a text has in an item's place, for chat templates that take text alone.
    """

    def __call__(self, prompt: Prompt) -> tuple[list[int], Inputs]:
        """Raises RequestError, without naming the prompt, for one that cannot be served."""


@dataclass(slots=True)
class ParsedPrompt:
    """A prompt as the engine takes it, and the text that it came from."""

    token_ids: list[int]
    text: str | None = None
    cache_salt: str = ""
    inputs: Inputs = NOTHING


def parse_prompts(
    prompts: Any, tokenizer: Tokenizer | None, processor: Processor | None = None, admission: Admission = TEXT_ALONE
) -> list[ParsedPrompt]:
    """One prompt or many. Raises RequestError that names the prompt."""
    if isinstance(prompts, str | Mapping) or _is_token_ids(prompts):
        prompts = [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts are texts, lists of token ids or dictionaries, not {type(prompts).__name__}")
    found = []
    for i, given in enumerate(prompts):
        try:
            found.append(process(_read(given, admission), tokenizer, processor, admission, _salt(given)))
        except RequestError as error:
            raise RequestError(f"prompt {i}: {error}") from error
    return found


def process(
    prompt: Prompt, tokenizer: Tokenizer | None, processor: Processor | None, admission: Admission, cache_salt: str = ""
) -> ParsedPrompt:
    """A prompt as the engine takes it. Raises RequestError that does not name it."""
    if processor is None:
        if prompt.encoder is not None:
            raise RequestError("it has an encoder_prompt, and the model has no encoder of text")
        return ParsedPrompt(prompt.tokens(tokenizer), prompt.text, cache_salt)
    token_ids, inputs = processor(prompt)
    # What was encoded already is counted when the plugin has told its items apart.
    found = Counter(item.modality for item in inputs.items)
    admission.check({name: count for name, count in found.items() if name in admission.modalities})
    return ParsedPrompt(token_ids, prompt.text, cache_salt, inputs)


def _is_token_ids(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], int)


def _salt(given: Any) -> str:
    salt = (given.get("cache_salt") if isinstance(given, Mapping) else None) or ""
    if not isinstance(salt, str) or len(salt) > _MAX_SALT:
        raise RequestError(f"cache_salt must be a text of at most {_MAX_SALT} characters")
    return salt


def _read(given: Any, admission: Admission) -> Prompt:
    """What the user wrote, whichever of the forms it has."""
    if isinstance(given, str):
        return Prompt(text=given)
    if isinstance(given, Mapping):
        return _read_mapping(given, admission)
    if isinstance(given, Sequence):
        return Prompt(token_ids=list(given))
    raise RequestError(f"it is of type {type(given).__name__}: give a text, token ids or a dictionary")


def _read_mapping(given: Mapping[str, Any], admission: Admission) -> Prompt:
    known = _TEXT_KEYS | _MORE_KEYS
    if unknown := sorted(set(given) - known, key=str):
        raise RequestError(f"it has the key {unknown[0]!r}; these are understood: {', '.join(sorted(known))}")
    if (encoder := given.get("encoder_prompt")) is not None:
        decoder = given.get("decoder_prompt")
        prompt = Prompt() if decoder is None else _read(decoder, admission)
        prompt.encoder = _read(encoder, admission)
        return prompt
    text, ids = given.get("prompt"), given.get("prompt_token_ids")
    if ids is not None and (isinstance(ids, str) or not isinstance(ids, Sequence)):
        raise RequestError("prompt_token_ids must be a list of token ids")
    if ids is None and not isinstance(text, str):
        raise RequestError("it has neither a text under `prompt` nor ids under `prompt_token_ids`")
    return Prompt(
        text,
        None if ids is None else list(ids),
        admission.attachments(given.get("multi_modal_data") or {}),
        admission.embeddings(given.get("multi_modal_embeds") or {}),
    )
