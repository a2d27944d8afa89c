"""A prompt for an encoder-decoder: the text is the encoder's, and the answer begins with a token of its own."""

from pathlib import Path

import torch

from bestiary.checkpoint import ConfigFile
from bestiary.errors import RequestError
from bestiary.inputs import Inputs, Item
from bestiary.prompts import Prompt
from bestiary.text import Tokenizer

__all__ = ["Processor"]


class Processor:
    """Prompts are what the encoder reads; `decoder_prompt`, where there is one, is how the answer begins."""

    def __init__(self, file: ConfigFile, folder: Path, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        start = file.get("decoder_start_token_id", int, 2)
        self._start, self._begun = start, [start, *_forced(file, folder)]
        self._vocabulary, self._longest = file.size("vocab_size"), file.size("max_position_embeddings", 1024)

    def __call__(self, prompt: Prompt) -> tuple[list[int], Inputs]:
        """The decoder's tokens, and the encoder's as an item to look at."""
        if prompt.encoder is None:
            return list(self._begun), Inputs(crossed=(self._item(prompt),))
        begun = prompt.text is not None or prompt.token_ids is not None
        answer = prompt.tokens(self._tokenizer, add_special_tokens=False) if begun else []
        if answer[:1] != [self._start]:
            answer = [self._start, *answer]
        return answer if len(answer) > 1 else list(self._begun), Inputs(crossed=(self._item(prompt.encoder),))

    def _item(self, prompt: Prompt) -> Item:
        ids = prompt.tokens(self._tokenizer)
        if not ids or len(ids) > self._longest:
            raise RequestError(f"the encoder's text has {len(ids)} tokens; give 1 to {self._longest}")
        for place, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self._vocabulary:
                raise RequestError(
                    f"the encoder's token {place} is {token!r}: ids are whole numbers from 0 to {self._vocabulary - 1}"
                )
        return Item.of("text", {"token_ids": torch.tensor(ids)}, len(ids))


def _forced(file: ConfigFile, folder: Path) -> tuple[int, ...]:
    """What an answer that nobody began says first: by generation_config.json, or config.json without one."""
    own = "generation_config.json"
    said = ConfigFile.load(folder, own) if (folder / own).exists() else file
    # The name that the setting had before there were others like it.
    old = said.get("force_bos_token_to_be_generated", bool, False)
    return said.token_ids("bos_token_id" if old else "forced_bos_token_id")[:1]
