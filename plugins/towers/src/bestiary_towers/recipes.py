"""Which of the steps in `pixels` a model's preprocessor_config.json asks for. Knows no tower.

A recipe's `size` tells what comes out of a picture without the picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bestiary.checkpoint import ConfigFile
from bestiary.checkpoint.jsonfile import read_object
from bestiary_towers import pixels
from bestiary_towers.pixels import Size

__all__ = ["Area", "Edge", "Fixed", "Recipe", "load"]

_LIMIT_BYTES = 1_000_000


def load(folder: Path) -> ConfigFile:
    """What a model's folder says of its pictures, in the file of older versions of transformers or of newer ones.

    Raises CheckpointNotFound where it says nothing.
    """
    path = folder / "processor_config.json"
    if path.exists():
        file = ConfigFile(read_object(path, _LIMIT_BYTES), path)
        if "image_processor" in file:
            return file.section("image_processor")
    path = folder / "preprocessor_config.json"
    return ConfigFile(read_object(path, _LIMIT_BYTES), path)


@dataclass(frozen=True)
class Recipe:
    """What all of them have: how a picture is stretched, and how its values become numbers."""

    resample: Image.Resampling
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def stretched(self, image: Image.Image, size: Size) -> Image.Image:
        """The picture in another size."""
        return pixels.resize(image, size, self.resample)

    def numbers(self, image: Image.Image) -> NDArray[np.float32]:
        """[3, height, width] float32."""
        return pixels.normalise(image, self.mean, self.std, self.scale)


def _common(file: ConfigFile) -> dict[str, Any]:
    for step in ("do_rescale", "do_normalize"):
        file.expect(step, True, default=True)
    found = {name: file.need(key, tuple[float, ...]) for name, key in (("mean", "image_mean"), ("std", "image_std"))}
    for name, values in found.items():
        file.must(len(values) == 3, f"image_{name}", f"has {len(values)} numbers; a picture has 3 colours")
    file.must(0.0 not in found["std"], "image_std", "has a zero")
    kinds = {int(kind): kind for kind in Image.Resampling}
    resample = kinds[file.expect("resample", *kinds, default=int(Image.Resampling.BICUBIC))]
    return {"resample": resample, "scale": file.get("rescale_factor", float, 1 / 255), **found}


def _box(file: ConfigFile, key: str) -> Size:
    """One number for a square, or height and width."""
    if isinstance(file.values.get(key), int):
        return Size(*(file.size(key),) * 2)
    return Size(file.size(f"{key}.height"), file.size(f"{key}.width"))


@dataclass(frozen=True)
class Fixed(Recipe):
    """CLIP's and SigLIP's: perhaps made a square, then stretched, then perhaps cropped."""

    #: The shorter side's length, or the size; None: as it comes.
    target: int | Size | None
    crop: Size | None
    #: Whether the mean colour first fills what the picture lacks to a square.
    square: bool

    @classmethod
    def read(cls, file: ConfigFile) -> Self:
        """Raises ConfigUnsupported for steps that no such processor has."""
        target: int | Size | None = None
        if file.get("do_resize", bool, True):
            by_side = isinstance(file.values.get("size"), int)
            target = file.get("size" if by_side else "size.shortest_edge", int) or _box(file, "size")
        # Processors differ in what its absence means.
        crops = file.need("do_center_crop", bool) if "crop_size" in file else file.get("do_center_crop", bool, False)
        return cls(
            target=target,
            crop=_box(file, "crop_size") if crops else None,
            square=file.get("do_pad", bool, False),
            **_common(file),
        )

    def size(self, size: Size) -> Size:
        """What a picture of that size becomes."""
        if self.crop is not None:
            return self.crop
        return self._target(Size(*(max(size),) * 2) if self.square else size)

    def _target(self, size: Size) -> Size:
        if isinstance(self.target, int):
            return pixels.scale_shortest(size, self.target)
        return size if self.target is None else self.target

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """[3, height, width] float32 of an RGB picture."""
        if self.square:
            image = pixels.pad_to_square(image, [int(255 * mean) for mean in self.mean])
        if self.target is not None:
            image = self.stretched(image, self._target(Size.of(image)))
        if self.crop is not None:
            image = pixels.centre_crop(image, self.crop)
        return self.numbers(image)


@dataclass(frozen=True)
class Edge(Recipe):
    """Pixtral's: shrunk to a longest side, and to whole patches."""

    longest: int
    patch: int

    @classmethod
    def read(cls, file: ConfigFile) -> Self:
        """Raises ConfigUnsupported for patches that are no squares, and steps that no such processor has."""
        file.expect("do_resize", True, default=True)
        patch = _box(file, "patch_size")
        file.must(patch.height == patch.width, "patch_size", f"is {patch.height} x {patch.width}; it must be a square")
        return cls(longest=file.size("size.longest_edge"), patch=patch.height, **_common(file))

    def size(self, size: Size) -> Size:
        """What a picture of that size becomes."""
        return pixels.fit_edge(size, self.longest, self.patch)

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """[3, height, width] float32 of an RGB picture."""
        return self.numbers(self.stretched(image, self.size(Size.of(image))))


@dataclass(frozen=True)
class Area(Recipe):
    """Qwen2-VL's: as many pixels as are allowed, in whole squares of merged patches, cut into patches."""

    least: int
    most: int
    patch: int
    frames: int
    merge: int

    @classmethod
    def read(cls, file: ConfigFile) -> Self:
        """Raises ConfigUnsupported for steps that no such processor has."""
        file.expect("do_resize", True, default=True)
        return cls(
            least=file.need(("min_pixels", "size.shortest_edge"), int),
            most=file.need(("max_pixels", "size.longest_edge"), int),
            patch=file.size("patch_size", 14),
            frames=file.size("temporal_patch_size", 2),
            merge=file.size("merge_size", 2),
            **_common(file),
        )

    def size(self, size: Size) -> Size:
        """What a picture of that size becomes. Raises RequestError for one that is far too long."""
        return pixels.fit_area(size, multiple=self.patch * self.merge, least=self.least, most=self.most)

    def grid(self, size: Size, frames: int = 1) -> tuple[int, int, int]:
        """Steps, rows and columns of the patches of a picture of that size, or of so many."""
        return (-(-frames // self.frames), *self.size(size).in_patches(self.patch))

    def __call__(self, images: Sequence[Image.Image]) -> tuple[NDArray[np.float32], tuple[int, int, int]]:
        """[T, numbers of a patch] float32 and the grid, of one RGB picture, or of a video's frames, all of one size."""
        size = self.size(Size.of(images[0]))
        stacked = np.stack([self.numbers(self.stretched(image, size)) for image in images])
        return pixels.flatten(stacked, patch=self.patch, frames=self.frames, merge=self.merge)
