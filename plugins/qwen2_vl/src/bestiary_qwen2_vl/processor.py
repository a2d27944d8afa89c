"""A prompt for a Qwen2-VL: its pictures and videos in patches, and every token's position on three axes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from bestiary.checkpoint import ConfigFile
from bestiary.errors import RequestError
from bestiary.inputs import Inputs, Item, Piece, Span, place, share_out
from bestiary.prompts import Prompt
from bestiary.text import Tokenizer
from bestiary_qwen2_vl.qwen2_vl import Config
from bestiary_towers import recipes

__all__ = ["Processor", "positions", "two_a_second"]

#: Frames that are taken of each second of a video, and the fewest and most of all of it.
_RATE, _LEAST, _MOST = 2.0, 4, 768


class Processor:
    """A placeholder stands for as many tokens as its item has vectors; users write what begins and ends an item."""

    placeholders: ClassVar = {name: f"<|vision_start|><|{name}_pad|><|vision_end|>" for name in ("image", "video")}

    def __init__(self, file: ConfigFile, folder: Path, tokenizer: Tokenizer | None) -> None:
        self._tokenizer, self._config = tokenizer, Config.read(file)
        self._recipe = recipes.Area.read(recipes.load(folder))
        self._merge = self._config.vision.merge

    def __call__(self, prompt: Prompt) -> tuple[list[int], Inputs]:
        """The tokens with each item's in the place of its placeholder, the items, and positions."""
        media, ready = prompt.media, prompt.embeddings
        images = [self._item("image", [image.image()]) for image in media.get("image", ())]
        videos = [self._item("video", _frames(video.video(two_a_second).frames)) for video in media.get("video", ())]
        images += self._ready("image", ready.get("image"))
        videos += self._ready("video", ready.get("video"))
        pieces = {
            (name, token): [Piece.filled(item, token) for item in items]
            for name, token, items in (
                ("image", self._config.image_token, images),
                ("video", self._config.video_token, videos),
            )
        }
        ids, spans = place(prompt.tokens(self._tokenizer), pieces)
        if not spans:
            return ids, Inputs()
        axes, after = positions(len(ids), spans, self._merge)
        return ids, Inputs(spans=spans, axes=axes, shift=after - len(ids))

    def _item(self, modality: str, frames: Sequence[Image.Image]) -> Item:
        patches, grid = self._recipe(frames)
        tensors = {"patches": torch.from_numpy(patches), "grid": torch.tensor(grid)}
        return Item.of(modality, tensors, len(patches) // self._merge**2)

    def _ready(self, modality: str, given: Any) -> Iterator[Item]:
        """Of {"image_embeds": [all, width], "image_grid_thw": [items, 3]}; grids count patches before the merge."""
        if given is None:
            return
        names = (f"{modality}_embeds", f"{modality}_grid_thw")
        if not isinstance(given, dict) or given.keys() != set(names):
            raise RequestError(f"ready embeddings of {modality} are a dictionary with {names[0]} and {names[1]}")
        vectors, grids = given[names[0]], given[names[1]]
        if grids.ndim != 2 or grids.shape[1] != 3 or grids.is_floating_point() or bool((grids < 1).any()):
            raise RequestError(f"{names[1]} must be [items, 3] whole numbers above 0: steps, rows and columns")
        counts = (grids.prod(1) // self._merge**2).tolist()
        for grid, share in zip(grids.long(), share_out(vectors, counts), strict=True):
            yield Item.of(modality, {"embeddings": share, "grid": grid}, len(share))


def positions(tokens: int, spans: Sequence[Span], merge: int) -> tuple[torch.Tensor, int]:
    """[3, tokens] int64 of each token in time, row and column, and the position that comes after all of them.

    Text counts on alike on all axes (section 2.1 of the paper), beyond the largest number that an item reached.
    """
    parts, at, done = [], 0, 0
    for span in spans:
        steps, rows, columns = (span.item.tensors["grid"] // torch.tensor([1, merge, merge])).tolist()
        parts.append(torch.arange(at, at + span.start - done).expand(3, -1))
        at += span.start - done
        parts.append(at + torch.cartesian_prod(*(torch.arange(n) for n in (steps, rows, columns))).T)
        at, done = at + max(steps, rows, columns), span.end
    parts.append(torch.arange(at, at + tokens - done).expand(3, -1))
    return torch.cat(parts, 1), at + tokens - done


def two_a_second(total: int, fps: float | None) -> list[int]:
    """Which frames of a video are seen: an even number, spread over all of it; all of one whose rate nobody knows."""
    if fps is None:
        return list(range(total))
    most = min(_MOST, total) // 2 * 2
    count = int(min(max(total / fps * _RATE, _LEAST), most)) // 2 * 2
    return [round(place) for place in torch.linspace(0, total - 1, max(count, 1)).tolist()]


def _frames(frames_THW3: Any) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in frames_THW3]
