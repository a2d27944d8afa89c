"""A prompt for a PaliGemma: the picture first, then the text and a line's end; all of it sees itself both ways."""

from pathlib import Path

import torch

from bestiary.checkpoint import ConfigFile
from bestiary.errors import RequestError
from bestiary.inputs import Inputs, Item, Piece, place
from bestiary.prompts import Prompt
from bestiary.text import Tokenizer
from bestiary_paligemma.paligemma import Config
from bestiary_towers import recipes
from bestiary_towers.pixels import Size

__all__ = ["Processor"]

_PLACEHOLDER = "<image>"


class Processor:
    """Users leave the placeholder out or write it at the start; of token ids nothing else is changed."""

    def __init__(self, file: ConfigFile, folder: Path, tokenizer: Tokenizer | None) -> None:
        self._tokenizer, self._config = tokenizer, Config.read(file)
        steps, side = recipes.load(folder), self._config.vision.image_size
        self._recipe = recipes.Fixed.read(steps)
        found = self._recipe.size(Size(side, 2 * side))
        steps.must(
            found == Size(side, side), "size", f"makes pictures of {tuple(found)}; the tower reads {side} x {side}"
        )

    def __call__(self, prompt: Prompt) -> tuple[list[int], Inputs]:
        """The tokens with the picture's before them, and the picture."""
        items = [self._picture(image.image()) for image in prompt.media.get("image", ())]
        for vectors in prompt.embeddings.get("image", ()):
            items.append(Item.of("image", {"embeddings": vectors}, len(vectors)))
        token = self._config.image_token
        ids = self._tokens(prompt, len(items))
        if token not in ids:
            ids = [token] * len(items) + ids
        ids, spans = place(ids, {("image", token): [Piece.filled(item, token) for item in items]})
        return ids, Inputs(spans=spans, prefix=len(ids))

    def _tokens(self, prompt: Prompt, items: int) -> list[int]:
        """Of a text, its own behind BOS with the end of a line, as the model was trained."""
        if prompt.token_ids is not None or prompt.text is None:
            return prompt.tokens(self._tokenizer)
        if (written := prompt.text.count(_PLACEHOLDER)) not in (0, items):
            raise RequestError(f"it has {_PLACEHOLDER} {written} times for {items} of image: leave it out")
        text = prompt.text.replace(_PLACEHOLDER, "").removesuffix("\n") + "\n"
        return Prompt(text=text).tokens(self._tokenizer)

    def _picture(self, image: object) -> Item:
        pixels = torch.from_numpy(self._recipe(image))  # type: ignore[arg-type]
        return Item.of("image", {"pixels": pixels}, self._config.vision.grid**2)
