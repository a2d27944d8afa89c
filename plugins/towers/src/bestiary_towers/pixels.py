"""Pictures to numbers, and the sizes that follow from a picture's own. Knows neither towers nor tokens.

Every size that a model sees follows from sizes alone, by the functions here that take a `Size`: what counts a prompt's
tokens and what makes the pixels thus agree. Pixels are those of transformers' processors on Pillow, bit by bit.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bestiary.errors import RequestError

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "HALF",
    "Size",
    "centre_crop",
    "fit_area",
    "fit_edge",
    "flatten",
    "normalise",
    "pad_to_square",
    "resize",
    "scale_shortest",
]

#: Of the pictures that CLIP was trained on; in the order red, green, blue.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
#: Mean and deviation that put pixels between -1 and 1.
HALF = (0.5, 0.5, 0.5)

_LONGEST_RATIO = 200


class Size(NamedTuple):
    """In pixels, or in patches. Pillow says it the other way round."""

    height: int
    width: int

    @classmethod
    def of(cls, image: Image.Image) -> "Size":
        """That of a picture."""
        return cls(image.height, image.width)

    def in_patches(self, patch: int) -> "Size":
        """Rows and columns of whole patches."""
        return Size(self.height // patch, self.width // patch)

    @property
    def area(self) -> int:
        """Height x width."""
        return self.height * self.width


def scale_shortest(size: Size, shortest: int) -> Size:
    """The same shape with the shorter side `shortest` long, the longer one rounded down."""
    long = int(shortest * max(size) / min(size))
    return Size(shortest, long) if size.height <= size.width else Size(long, shortest)


def fit_edge(size: Size, longest: int, multiple: int) -> Size:
    """Shrunk until no side is above `longest`, rounded down, then each side up to a multiple, as Pixtral does."""
    ratio = max(*size, longest) / longest
    height, width = (max(1, math.floor(side / ratio)) if ratio > 1 else side for side in size)
    return Size(math.ceil(height / multiple) * multiple, math.ceil(width / multiple) * multiple)


def fit_area(size: Size, *, multiple: int, least: int, most: int) -> Size:
    """The same shape as nearly as multiples allow, with `least` to `most` pixels, as Qwen2-VL does.

    Raises RequestError for a picture that is over 200 times as long as wide.
    """
    if max(size) > _LONGEST_RATIO * min(size):
        raise RequestError(
            f"the image is {size.width} x {size.height}, and the model reads none whose one side is over "
            f"{_LONGEST_RATIO} times the other: crop it"
        )
    height, width = (round(side / multiple) * multiple for side in size)
    if height * width > most:
        ratio = math.sqrt(size.area / most)
        height, width = (max(multiple, math.floor(side / ratio / multiple) * multiple) for side in size)
    elif height * width < least:
        ratio = math.sqrt(least / size.area)
        height, width = (math.ceil(side * ratio / multiple) * multiple for side in size)
    return Size(height, width)


def resize(image: Image.Image, size: Size, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """The picture stretched to a size."""
    return image.resize((size.width, size.height), resample)


def centre_crop(image: Image.Image, size: Size) -> Image.Image:
    """The middle of the picture; black where it is too small."""
    top, left = (image.height - size.height) // 2, (image.width - size.width) // 2
    return image.crop((left, top, left + size.width, top + size.height))


def pad_to_square(image: Image.Image, colour: Sequence[int]) -> Image.Image:
    """The picture in the middle of a square as wide as its longer side."""
    side = max(image.size)
    square = Image.new(image.mode, (side, side), tuple(colour))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def normalise(
    image: Image.Image, mean: Sequence[float], std: Sequence[float], scale: float = 1 / 255
) -> NDArray[np.float32]:
    """[3, height, width] float32 of an RGB picture: (value x scale - mean) / std."""
    scaled = (np.arange(256) * scale).astype(np.float32)
    # A pixel has one of 256 values: each is worked out once.
    values_CV = [(scaled - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True)]
    pixels_HWC = np.asarray(image)
    return np.stack([values_CV[c][pixels_HWC[..., c]] for c in range(len(values_CV))])


def flatten(
    pixels_FCHW: NDArray[np.float32], *, patch: int, frames: int, merge: int
) -> tuple[NDArray[np.float32], tuple[int, int, int]]:
    """[T, C x frames x patch x patch] and the grid (steps, rows, columns) of a video, or of a picture as one frame.

    The last frame is repeated until `frames` divide them. Patches go step by step, those of each merge x merge square
    after each other. Both sides must be multiples of patch x merge.
    """
    missing = -len(pixels_FCHW) % frames
    pixels_FCHW = np.concatenate((pixels_FCHW, np.repeat(pixels_FCHW[-1:], missing, 0)))
    steps, channels = len(pixels_FCHW) // frames, pixels_FCHW.shape[1]
    rows, columns = Size(*pixels_FCHW.shape[2:]).in_patches(patch)
    cut = pixels_FCHW.reshape(
        (steps, frames, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    ).transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return cut.reshape(steps * rows * columns, -1), (steps, rows, columns)
