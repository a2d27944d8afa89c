"""How a picture is laid over tiles of one size: its canvas, its own size there, and its pixels. Knows no model."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bestiary.checkpoint import ConfigFile
from bestiary_towers import pixels
from bestiary_towers.pixels import Size

__all__ = ["Tiling", "canvases"]


def canvases(most: int) -> list[Size]:
    """All ways to lay out up to so many tiles, in rows and columns; a picture's way is known by its number here."""
    return [Size(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]


@dataclass(frozen=True)
class Tiling:
    """What preprocessor_config.json says."""

    side: int
    most: int
    resample: Image.Resampling
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, file: ConfigFile) -> Self:
        """Raises ConfigUnsupported for steps that no such processor has."""
        for step in ("do_resize", "do_rescale", "do_normalize", "do_pad"):
            file.expect(step, True, default=True)
        side = file.size("size.height")
        file.expect("size.width", side)
        kinds = {int(kind): kind for kind in Image.Resampling}
        return cls(
            side=side,
            most=file.size("max_image_tiles", 4),
            resample=kinds[file.expect("resample", *kinds, default=int(Image.Resampling.BILINEAR))],
            scale=file.get("rescale_factor", float, 1 / 255),
            mean=file.need("image_mean", tuple[float, ...]),
            std=file.need("image_std", tuple[float, ...]),
        )

    def canvas(self, size: Size) -> Size:
        """Rows and columns of the tiles: those that enlarge a picture least, or else shrink it least; the fewest."""

        def scale(tiles: Size) -> float:
            return min(tiles.height * self.side / size.height, tiles.width * self.side / size.width)

        known = canvases(self.most)
        scales = [scale(tiles) for tiles in known]
        best = min((s for s in scales if s >= 1), default=max(scales))
        return min((tiles for tiles, s in zip(known, scales, strict=True) if s == best), key=lambda tiles: tiles.area)

    def fitted(self, size: Size, canvas: Size) -> Size:
        """A picture's size on its canvas, at least a tile in each direction where its shape allows that."""
        target = Size(*(min(max(own, self.side), tiles * self.side) for own, tiles in zip(size, canvas, strict=True)))
        by_height, by_width = target.height / size.height, target.width / size.width
        if by_width < by_height:
            return Size(min(math.floor(size.height * by_width) or 1, target.height), target.width)
        return Size(target.height, min(math.floor(size.width * by_height) or 1, target.width))

    def __call__(self, image: Image.Image) -> tuple[NDArray[np.float32], int]:
        """[tiles, 3, side, side] float32 of an RGB picture, row by row, and the number of its canvas, from 1 on.

        What the picture leaves free is black before values are normalised.
        """
        canvas = self.canvas(Size.of(image))
        resized = pixels.resize(image, self.fitted(Size.of(image), canvas), self.resample)
        filled = Image.new("RGB", (canvas.width * self.side, canvas.height * self.side))
        filled.paste(resized)
        cut = pixels.normalise(filled, self.mean, self.std, self.scale).reshape(
            3, canvas.height, self.side, canvas.width, self.side
        )
        tiles = np.ascontiguousarray(cut.transpose(1, 3, 0, 2, 4)).reshape(-1, 3, self.side, self.side)
        return tiles, canvases(self.most).index(canvas) + 1
