"""What models take out of a tower: the stream after some of its layers, side by side. Knows no tower."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bestiary.blocks import Items
from bestiary.errors import ConfigUnsupported

__all__ = ["after", "streams"]


def after(features: Sequence[int], layers: int) -> tuple[int, ...]:
    """How many layers each feature has behind it; -1 is what comes out of the last, 0 what goes into the first.

    Raises ConfigUnsupported for a feature that the tower does not have.
    """
    found = tuple(feature + layers + 1 if feature < 0 else feature for feature in features)
    if not found or not all(0 <= depth <= layers for depth in found):
        raise ConfigUnsupported(
            f"vision_feature_layer is {list(features)}; the tower has {layers} layers: give {-1 - layers} to {layers}"
        )
    return found


def streams(layers: nn.ModuleList, x_TD: Tensor, items: Items, depths: Sequence[int]) -> Tensor:
    """[T, width x depths] of the stream [T, width] that enters; layers beyond the deepest do not run."""
    found = {0: x_TD}
    for number in range(max(depths)):
        x_TD = layers[number](x_TD, items)
        if number + 1 in depths:
            found[number + 1] = x_TD
    return found[depths[0]] if len(depths) == 1 else torch.cat([found[depth] for depth in depths], -1)
