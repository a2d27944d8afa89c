"""Prompts as a user gives them, for proofs: tokens, and perhaps pictures, sounds and videos, drawn by a seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = ["Sample", "film", "picture", "sound"]


@dataclass(frozen=True)
class Sample:
    """One prompt. Its token ids hold a placeholder where an item stands, as the model's users write it."""

    token_ids: tuple[int, ...]
    media: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def prompt(self) -> dict[str, Any]:
        """As `LLM.generate` takes it."""
        found: dict[str, Any] = {"prompt_token_ids": list(self.token_ids)}
        return {**found, "multi_modal_data": {name: list(items) for name, items in self.media.items()}}

    def altered(self) -> Self:
        """The same tokens with other items of the same sizes."""
        return replace(
            self, media={name: [_altered(name, item) for item in items] for name, items in self.media.items()}
        )


def picture(seed: int, width: int, height: int) -> "Image":
    """An RGB picture of noise in large blots, so that it survives being stretched."""
    import numpy as np
    from PIL import Image

    blots = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(blots).resize((width, height), Image.Resampling.BILINEAR)


def film(seed: int, frames: int, width: int, height: int) -> "NDArray[np.uint8]":
    """[frames, height, width, 3], a picture for each."""
    import numpy as np

    return np.stack([np.asarray(picture(seed * 100 + i, width, height)) for i in range(frames)])


def sound(seed: int, samples: int) -> "NDArray[np.float32]":
    """[samples] of a few tones and some noise, at whatever rate the model hears."""
    import numpy as np

    draw = np.random.default_rng(seed)
    time = np.arange(samples) / 16000
    tones = sum(np.sin(2 * np.pi * hertz * time) for hertz in draw.integers(100, 4000, 3))
    found: NDArray[np.float32] = (0.2 * tones + 0.05 * draw.standard_normal(samples)).astype(np.float32)
    return found


def _altered(modality: str, item: Any) -> Any:
    import numpy as np

    if modality == "audio":
        samples, rate = item
        return sound(len(samples) + 1, len(samples)), rate
    if modality == "video":
        return np.ascontiguousarray(255 - item)
    from PIL import ImageOps

    return ImageOps.invert(item)
