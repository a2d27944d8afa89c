"""A prompt for a LLaVA: each placeholder becomes as many tokens as the picture there has vectors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bestiary.checkpoint import ConfigFile
from bestiary.errors import ConfigUnsupported, RequestError
from bestiary.inputs import Inputs, Item, Piece, place, share_out
from bestiary.prompts import Prompt
from bestiary.text import Tokenizer
from bestiary_llava.llava import Config
from bestiary_towers import recipes
from bestiary_towers.pixels import Size

__all__ = ["Processor"]

_SIZES = "'image_sizes': [pictures, 2] the height and width, in pixels, that each was read in}"


class Processor:
    """Pictures of one size for CLIP and SigLIP; of any size, row by row, for Pixtral."""

    def __init__(self, file: ConfigFile, folder: Path, tokenizer: Tokenizer | None) -> None:
        self._tokenizer, self._config = tokenizer, Config.read(file)
        steps, vision = recipes.load(folder), self._config.vision
        self._recipe: Any
        self._ends: tuple[int, int] | None = None
        self.placeholders = {"image": "[IMG]" if self._config.tower == "pixtral" else "<image>"}
        if self._config.tower == "pixtral":
            self._recipe = recipes.Edge.read(steps)
            known = tokenizer or Tokenizer.load(folder)
            self._ends = (_id(known, "[IMG_BREAK]"), _id(known, "[IMG_END]"))
            return
        self._recipe = recipes.Fixed.read(steps)
        side = Size(vision.image_size, vision.image_size)
        for shape in (side, Size(2 * side.height, 3 * side.width)):
            steps.must(
                self._recipe.size(shape) == side,
                "size",
                f"makes pictures of {tuple(self._recipe.size(shape))}; the tower reads {side.height} x {side.width}",
            )

    def __call__(self, prompt: Prompt) -> tuple[list[int], Inputs]:
        """The tokens with each picture's in the place of its placeholder, and the pictures."""
        pictures = [self._picture(image.image()) for image in prompt.media.get("image", ())]
        ready = list(self._ready(prompt.embeddings.get("image", ())))
        token = self._config.image_token
        ids, spans = place(prompt.tokens(self._tokenizer), {("image", token): [*pictures, *ready]})
        return ids, Inputs(spans=spans)

    def _picture(self, image: Any) -> Piece:
        pixels = torch.from_numpy(self._recipe(image))
        rows, columns = Size(*pixels.shape[1:]).in_patches(self._config.vision.patch_size)
        vectors = rows * columns + (self._config.keeps_class and self._config.tower == "clip_vision_model")
        item = Item.of("image", {"pixels": pixels}, vectors)
        return self._by_rows(item, rows, columns) if self._ends else Piece.filled(item, self._config.image_token)

    def _ready(self, given: Any) -> Iterator[Piece]:
        if not isinstance(given, dict):
            if self._ends and given:
                raise RequestError("ready embeddings of a Pixtral are {'image_embeds': [all, width], " + _SIZES)
            for vectors in given:
                yield Piece.filled(Item.of("image", {"embeddings": vectors}, len(vectors)), self._config.image_token)
            return
        if not self._ends or given.keys() != {"image_embeds", "image_sizes"}:
            raise RequestError(f"ready embeddings have the keys {sorted(given)}: give a list, of each [vectors, width]")
        patch, sizes = self._config.vision.patch_size, given["image_sizes"]
        if sizes.ndim != 2 or sizes.shape[1] != 2 or bool((sizes < patch).any()):
            raise RequestError(f"image_sizes must be [pictures, 2]: heights and widths in pixels, {patch} or more")
        grids = [Size(int(height), int(width)).in_patches(patch) for height, width in sizes.tolist()]
        shares = share_out(given["image_embeds"], [grid.area for grid in grids])
        for (rows, columns), vectors in zip(grids, shares, strict=True):
            yield self._by_rows(Item.of("image", {"embeddings": vectors}, len(vectors)), rows, columns)

    def _by_rows(self, item: Item, rows: int, columns: int) -> Piece:
        """After each row a token that breaks it, after the last one that ends the picture."""
        assert self._ends is not None
        ids = ([self._config.image_token] * columns + [self._ends[0]]) * rows
        return Piece(item, (*ids[:-1], self._ends[1]), ((True,) * columns + (False,)) * rows)


def _id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.id_of(token)
    if found is None:
        raise ConfigUnsupported(f"tokenizer.json has no token {token}, which stands between the rows of a picture")
    return found
