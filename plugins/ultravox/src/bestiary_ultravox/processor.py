"""A prompt for an Ultravox: each placeholder becomes as many tokens as the recording there has vectors."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch

from bestiary.checkpoint import ConfigFile
from bestiary.errors import RequestError
from bestiary.inputs import Inputs, Item, Span
from bestiary.media import Attachment
from bestiary.prompts import Prompt
from bestiary.text import Tokenizer
from bestiary_towers import sound
from bestiary_ultravox.ultravox import Config

__all__ = ["PLACEHOLDER", "Processor"]

#: What stands for a recording in a text. It is no token.
PLACEHOLDER = "<|audio|>"
_HOP = sound.RATE // 100


class Processor:
    """Recordings of any length; a placeholder is a word in a text, and a token where config.json has one for it."""

    placeholders: ClassVar = {"audio": PLACEHOLDER}

    def __init__(self, file: ConfigFile, folder: Path, tokenizer: Tokenizer | None) -> None:
        self._tokenizer, self._config = tokenizer, Config.read(file)
        self._mark = self._config.audio_token
        if tokenizer and self._mark is not None and _is_word(tokenizer, self._mark):
            self._mark = None  # the first configurations name one of Llama 2, which is a word elsewhere
        ends = (*file.token_ids("eos_token_id"), *self._config.text.token_ids("eos_token_id"), 0)
        self._filler = tokenizer.eos_id if tokenizer and tokenizer.eos_id is not None else ends[0]

    def __call__(self, prompt: Prompt) -> tuple[list[int], Inputs]:
        """The tokens with each recording's in the place of its placeholder, and the recordings."""
        parts = self._parts(prompt)
        ready, given = prompt.embeddings.get("audio", ()), prompt.media.get("audio", ())
        if isinstance(ready, dict):
            raise RequestError("ready embeddings of audio are a dictionary: give a list, of each [vectors, width]")
        if len(parts) - 1 != len(given) + len(ready):
            raise RequestError(
                f"it has {len(parts) - 1} placeholders for {len(given) + len(ready)} of audio: write "
                f"{self._placeholder(prompt)} where each of them stands"
            )
        items = [self._recording(audio) for audio in given]
        items += [Item.of("audio", {"embeddings": vectors}, len(vectors)) for vectors in ready]
        return self._joined(parts, items)

    def _parts(self, prompt: Prompt) -> list[list[int]]:
        """The tokens before, between and after the placeholders."""
        ids, text = prompt.token_ids, prompt.text or ""
        if PLACEHOLDER in text and self._tokenizer and (ids is None or self._mark not in ids):
            # Whoever gives ids beside the text, as a conversation does, has written the special tokens into it.
            pieces = enumerate(text.split(PLACEHOLDER))
            tokenizer, adds = self._tokenizer, ids is None
            return [tokenizer.encode(piece, add_special_tokens=adds and not i) for i, piece in pieces]
        return list(_split(prompt.tokens(self._tokenizer), self._mark))

    def _placeholder(self, prompt: Prompt) -> str:
        if prompt.token_ids is None or prompt.text is not None:
            return PLACEHOLDER
        return f"{PLACEHOLDER} in a text" if self._mark is None else f"the token {self._mark}"

    def _recording(self, audio: Attachment) -> Item:
        samples, config = audio.audio(sound.RATE).samples, self._config
        if config.whole_frames:
            samples = sound.fit_length(samples, max(-(-len(samples) // _HOP), 2) * _HOP)
        spectrogram = torch.from_numpy(sound.log_mel(samples, config.audio.bins))
        return Item.of("audio", {"spectrogram": spectrogram}, config.num_vectors(spectrogram.shape[1]))

    def _joined(self, parts: Sequence[list[int]], items: Sequence[Item]) -> tuple[list[int], Inputs]:
        ids, spans = list(parts[0]), list[Span]()
        for item, part in zip(items, parts[1:], strict=True):
            spans.append(Span(item, len(ids), (True,) * item.num_vectors))
            ids += [self._filler] * item.num_vectors + part
        return ids, Inputs(spans=spans)


def _is_word(tokenizer: Tokenizer, token: int) -> bool:
    return tokenizer.token(token) is not None and token not in tokenizer.special_ids


def _split(ids: Sequence[int], mark: int | None) -> Iterator[list[int]]:
    part: list[int] = []
    for token in ids:
        if token == mark:
            yield part
            part = []
        else:
            part.append(token)
    yield part
