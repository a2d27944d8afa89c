"""Tiles against transformers' processor, for pictures of every shape."""

from pathlib import Path

import numpy as np
import pytest
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from bestiary.checkpoint import ConfigFile
from bestiary.testing import picture
from bestiary_mllama.proof import STEPS
from bestiary_mllama.tiles import Tiling, canvases

SIZES = [(16, 16), (1, 1), (3, 90), (90, 3), (17, 16), (33, 31), (64, 64), (200, 150), (16, 65), (15, 47), (64, 16)]


@pytest.mark.parametrize("most", [1, 3, 4, 6])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_tiles_and_their_layout_are_those_of_transformers(width: int, height: int, most: int) -> None:
    steps = {**STEPS, "max_image_tiles": most}
    image = picture(width + height, width, height)
    tiles, canvas = Tiling.read(ConfigFile(steps, Path("preprocessor_config.json")))(image)
    made = MllamaImageProcessorPil(**steps)([image], return_tensors="np")
    assert made["num_tiles"] == [[len(tiles)]]
    assert made["aspect_ratio_ids"].tolist() == [[canvas]]
    assert np.array_equal(made["pixel_values"][0, 0, : len(tiles)], tiles)


def test_layouts_are_numbered_as_published() -> None:
    assert canvases(4) == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
