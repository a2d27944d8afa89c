"""An image from whatever the user gave: RGB, upright, within limits. Knows no model and no resizing."""

from io import BytesIO
from typing import TYPE_CHECKING, Any

from bestiary.errors import RequestError
from bestiary.media.decoders import decoding, extra
from bestiary.media.limits import MediaLimits
from bestiary.media.sources import Sources, read

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["load_image"]

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_WHAT = "the image"


def load_image(
    source: Any,
    *,
    alpha: str = "drop",
    limits: MediaLimits = MediaLimits(),  # noqa: B008 - frozen
    sources: Sources = Sources(),  # noqa: B008 - frozen
) -> "Image":
    """One image as a new PIL image of mode RGB.

    `source` is a PIL image, an array [H, W, 3 or 4] of uint8, the bytes of a file, a path, or an address (see
    `Sources`). Of an animation it is the first frame. EXIF orientation is applied and the mode converted as
    `transformers.image_utils.load_image` does it: `alpha="drop"` keeps the colours below transparency as they are
    stored. `alpha="white"` lays the image on white. Raises RequestError, and CapabilityMissing without Pillow.
    """
    with extra("image"):
        from PIL import Image, ImageOps
    if alpha not in ("drop", "white"):
        raise RequestError(f"alpha is {alpha!r}: give 'drop' or 'white'")
    if isinstance(source, Image.Image):
        opened = source
    elif hasattr(source, "__array_interface__"):
        opened = _from_array(source, limits)
    else:
        opened = _open(read(source, "image", limits, sources))
    _check_size(opened.size, limits)
    with decoding(_WHAT):
        upright = ImageOps.exif_transpose(opened)
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            if alpha == "white":
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        return upright.convert("RGB")


def _open(data: bytes) -> "Image":
    """Reads the header alone."""
    from PIL import Image, UnidentifiedImageError

    try:
        with decoding(_WHAT):
            return Image.open(BytesIO(data), formats=_FORMATS)
    except RequestError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            known = ", ".join(_FORMATS)
            raise RequestError(
                f"{_WHAT} is of no format that is read here, or is broken: send one of {known}"
            ) from None
        if isinstance(error.__cause__, Image.DecompressionBombError | Image.DecompressionBombWarning):
            raise RequestError(
                f"{_WHAT} has more pixels than max_image_pixels and than Pillow opens: send less, or raise "
                f"MediaLimits(max_image_pixels=...) and PIL.Image.MAX_IMAGE_PIXELS"
            ) from None
        raise


def _from_array(array: Any, limits: MediaLimits) -> "Image":
    from PIL import Image

    shape = tuple(array.shape)
    if array.dtype.str != "|u1" or len(shape) != 3 or shape[2] not in (3, 4):
        raise RequestError(f"{_WHAT} is an array {shape} of {array.dtype}: give [height, width, 3 or 4] of uint8")
    _check_size((shape[1], shape[0]), limits)
    return Image.fromarray(array)


def _check_size(size: tuple[int, int], limits: MediaLimits) -> None:
    if min(size) < 1:
        raise RequestError(f"{_WHAT} is {size[0]} pixels wide and {size[1]} high: there is nothing to see")
    limits.check("max_image_pixels", size[0] * size[1], _WHAT)
