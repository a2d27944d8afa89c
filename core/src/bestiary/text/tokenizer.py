"""A checkpoint's tokenizer: text to token ids and back. Knows no chat, no request and no model.

It is what `tokenizer.json` says, run by the `tokenizers` library, with two things from `tokenizer_config.json`:
which tokens have a name, and whether a begin or end token is to be added where `tokenizer.json` does not do so.

Control tokens that a user types (`<|im_start|>` in a prompt) become the control tokens themselves, as they do
elsewhere: a chat template writes its own control tokens into the same text, so the two cannot be told apart here.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import tokenizers

from bestiary.errors import BestiaryError, CheckpointMalformed, CheckpointNotFound, RequestError
from bestiary.text.special import special_tokens, tokenizer_config

__all__ = ["Tokenizer"]


class Tokenizer:
    """Turns text into token ids and token ids into text; safe to share between threads.

    `special` holds the named tokens (`bos_token`, `eos_token`, ...); those the vocabulary has become special.
    `add_bos` and `add_eos` ask for these two around every prompt, where the backend does not add them by itself.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: Mapping[str, str] | None = None,
        *,
        add_bos: bool = False,
        add_eos: bool = False,
    ) -> None:
        # What the training left behind: a served prompt is neither cut nor filled up.
        backend.no_padding()
        backend.no_truncation()
        named = {name: text for name, text in (special or {}).items() if backend.token_to_id(text) is not None}
        plain = [text for text in named.values() if backend.token_to_id(text) not in _special_ids(backend)]
        backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in plain])
        self._backend = backend
        self.special_tokens: dict[str, str] = named
        self.bos_id: int | None = backend.token_to_id(named["bos_token"]) if "bos_token" in named else None
        self.eos_id: int | None = backend.token_to_id(named["eos_token"]) if "eos_token" in named else None
        self.special_ids = _special_ids(backend)
        added: list[int] = backend.encode("").ids
        has_bos = added[:1] == [self.bos_id]
        has_eos = added[has_bos:][-1:] == [self.eos_id]
        self._head = [self.bos_id] if add_bos and self.bos_id is not None and not has_bos else []
        self._tail = [self.eos_id] if add_eos and self.eos_id is not None and not has_eos else []

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Reads the tokenizer of the checkpoint in a folder.

        Raises CheckpointNotFound where there is no `tokenizer.json`, CheckpointMalformed where it makes no sense.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointNotFound(
                f"there is no tokenizer.json in {folder}: set skip_tokenizer_init=True to serve token ids, or convert "
                "the tokenizer that is there with transformers' AutoTokenizer and save_pretrained"
            )
        # The library's threads would take the cores from the model, and must not be used after a fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        config = tokenizer_config(folder)
        with _typed(CheckpointMalformed, f"{path} is no tokenizer that can be used"):
            return cls(
                tokenizers.Tokenizer.from_file(str(path)),
                special_tokens(config),
                add_bos=config.get("add_bos_token") is True,
                add_eos=config.get("add_eos_token") is True,
            )

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included."""
        size: int = self._backend.get_vocab_size(with_added_tokens=True)
        return size

    def token(self, token_id: int) -> str | None:
        """Returns a token as the vocabulary spells it, or None where no token has this id."""
        if not 0 <= token_id < 2**32:
            return None
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def id_of(self, token: str) -> int | None:
        """Returns the id of a token as the vocabulary spells it, or None where there is no such token."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of a text, with what the tokenizer adds around a prompt unless told otherwise.

        Raises RequestError for a text that is no Unicode (a lone surrogate), or that the vocabulary cannot spell.
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Returns the token ids of each text, as `encode` would."""
        for text in texts:
            _check_unicode(text)
        with _typed(RequestError, "the tokenizer cannot encode this text"):
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        if not add_special_tokens:
            return [encoding.ids for encoding in encodings]
        return [[*self._head, *encoding.ids, *self._tail] for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of token ids; bytes that make no character become U+FFFD, ids of no token nothing."""
        try:
            text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # not through _typed: this is called for every token that is generated
            raise RequestError(f"the tokenizer cannot decode these token ids: {error}") from error
        return text


def _special_ids(backend: tokenizers.Tokenizer) -> frozenset[int]:
    return frozenset(token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special)


@contextmanager
def _typed(kind: type[BestiaryError], what: str) -> Iterator[None]:
    """Turns whatever the library raises into an error of ours; its panics derive from BaseException alone."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise kind(f"{what}: {error}") from error


def _check_unicode(text: str) -> None:
    if not isinstance(text, str):
        raise RequestError(f"a prompt must be a string, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}, "
            "which is no Unicode character"
        ) from error
