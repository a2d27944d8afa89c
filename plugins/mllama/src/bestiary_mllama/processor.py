"""A prompt for a Llama 3.2 Vision: the picture is one token, from which on tokens look at its tiles."""

from pathlib import Path
from typing import ClassVar

import torch

from bestiary.checkpoint import ConfigFile
from bestiary.errors import RequestError
from bestiary.inputs import Inputs, Item, Look
from bestiary.media import Attachment
from bestiary.prompts import Prompt
from bestiary.text import Tokenizer
from bestiary_mllama.mllama import Config
from bestiary_mllama.tiles import Tiling, canvases
from bestiary_towers import recipes

__all__ = ["Processor"]

_PLACEHOLDER = "<|image|>"


class Processor:
    """One picture at most; a placeholder that begins a text stands before BOS."""

    placeholders: ClassVar = {"image": _PLACEHOLDER}

    def __init__(self, file: ConfigFile, folder: Path, tokenizer: Tokenizer | None) -> None:
        self._tokenizer, self._config = tokenizer, Config.read(file)
        steps, vision = recipes.load(folder), self._config.vision
        self._tiling = Tiling.read(steps)
        fits = (self._tiling.side, self._tiling.most) == (vision.side, vision.tiles)
        steps.must(fits, "size", f"and max_image_tiles differ from the tower's {vision.tiles} tiles of {vision.side}")
        steps.must(
            len(canvases(vision.tiles)) == vision.canvases,
            "max_image_tiles",
            f"is {vision.tiles}; the tower knows {vision.canvases} ways to lay tiles out",
        )

    def __call__(self, prompt: Prompt) -> tuple[list[int], Inputs]:
        """The tokens, and the picture as an item to look at."""
        ids, token = self._tokens(prompt), self._config.image_token
        pictures = [self._picture(image) for image in prompt.media.get("image", ())]
        if ids.count(token) != len(pictures):
            raise RequestError(
                f"it has {ids.count(token)} placeholders (token {token}) for {len(pictures)} of image: "
                f"write {_PLACEHOLDER} where each of them stands"
            )
        if not pictures:
            return ids, Inputs()
        item, place = pictures[0], ids.index(token)
        seen = len(item.tensors["pixels"]) * self._config.vision.tokens
        # Tokens before the picture look at everything, at tiles that it lacks too, as in the reference.
        before = [Look(0, 0, item.num_vectors, heeds=False)] if place else []
        return ids, Inputs(crossed=(item,), looks=(*before, Look(place, 0, seen)))

    def _tokens(self, prompt: Prompt) -> list[int]:
        if prompt.token_ids is not None or prompt.text is None or self._tokenizer is None:
            return prompt.tokens(self._tokenizer)
        rest = prompt.text
        while rest.startswith(_PLACEHOLDER):
            rest = rest.removeprefix(_PLACEHOLDER)
        first = (len(prompt.text) - len(rest)) // len(_PLACEHOLDER)
        return [self._config.image_token] * first + self._tokenizer.encode(rest)

    def _picture(self, image: Attachment) -> Item:
        tiles, canvas = self._tiling(image.image())
        tensors = {"pixels": torch.from_numpy(tiles), "canvas": torch.tensor(canvas)}
        return Item.of("image", tensors, self._config.vision.tiles * self._config.vision.tokens)
