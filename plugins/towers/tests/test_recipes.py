"""Recipes read from the files that transformers writes, against what its processors make of pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from bestiary.checkpoint import ConfigFile
from bestiary.errors import CheckpointNotFound, ConfigUnsupported
from bestiary_towers.pixels import Size
from bestiary_towers.recipes import Area, Edge, Fixed, load

SIZES = [Size(64, 64), Size(50, 91), Size(91, 50), Size(17, 200), Size(9, 13)]
CROP = {"height": 20, "width": 24}
FIXED = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=CROP),
    "clip as it was first written": CLIPImageProcessorPil(size=32, crop_size=28),
    "clip without a crop": CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False),
    "clip without stretching": CLIPImageProcessorPil(do_resize=False, crop_size=CROP),
    "siglip": SiglipImageProcessorPil(size={"height": 28, "width": 42}),
    "siglip, bilinear, of other numbers": SiglipImageProcessorPil(
        size={"height": 28, "width": 28}, resample=2, rescale_factor=1 / 128, image_mean=[0.1, 0.2, 0.3]
    ),
    "llava with a square": LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 32}, crop_size=CROP),
    "llava with a square and no crop": LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 32}, do_center_crop=False
    ),
}


def picture(size: Size) -> Image.Image:
    return Image.fromarray(np.random.default_rng(size.area).integers(0, 256, (*size, 3), dtype=np.uint8))


def saved(processor: Any, folder: Path, *, nested: bool = False) -> ConfigFile:
    """The file as transformers writes it, or within a processor's as it does now where there is one."""
    processor.save_pretrained(folder)
    if nested:
        path = folder / "preprocessor_config.json"
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": json.loads(path.read_text())}))
        path.unlink()
    return load(folder)


@pytest.mark.parametrize("kind", FIXED)
@pytest.mark.parametrize("size", SIZES)
def test_a_fixed_recipe_makes_the_references_pixels(kind: str, size: Size, tmp_path: Path) -> None:
    recipe = Fixed.read(saved(FIXED[kind], tmp_path))
    expected = FIXED[kind](picture(size), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(recipe(picture(size)), expected)
    assert recipe.size(size) == expected.shape[1:]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_an_edge_recipe_makes_the_references_pixels(size: Size, nested: bool, tmp_path: Path) -> None:
    processor = PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})
    recipe = Edge.read(saved(processor, tmp_path, nested=nested))
    expected = processor(picture(size), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(recipe(picture(size)), expected)
    assert recipe.size(size) == expected.shape[1:]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_an_area_recipe_makes_the_references_patches(size: Size, old: bool, tmp_path: Path) -> None:
    processor = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 256, "longest_edge": 2048})
    file = saved(processor, tmp_path)
    if old:  # as the published files say it
        values = {key: value for key, value in file.values.items() if key != "size"}
        file = ConfigFile({**values, "min_pixels": 256, "max_pixels": 2048}, file.path)
    recipe = Area.read(file)
    expected = processor(picture(size), return_tensors="np")
    patches, grid = recipe([picture(size)])
    np.testing.assert_array_equal(patches, expected["pixel_values"])
    assert [list(grid)] == expected["image_grid_thw"].tolist()
    assert recipe.grid(size) == grid


def test_an_area_recipe_counts_a_videos_steps(tmp_path: Path) -> None:
    recipe = Area.read(saved(Qwen2VLImageProcessorPil(patch_size=4), tmp_path))
    for frames in (1, 2, 3, 4):
        patches, grid = recipe([picture(Size(60, 100))] * frames)
        assert recipe.grid(Size(60, 100), frames) == grid
        assert len(patches) == grid[0] * grid[1] * grid[2]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"do_normalize": False}, "do_normalize is False"),
        ({"image_mean": [0.5]}, "image_mean has 1 numbers"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std has a zero"),
        ({"image_mean": None}, "image_mean is missing"),
        ({"resample": 9}, "resample is 9"),
        ({"size": {"height": 28}}, "size.width is missing"),
        ({"size": {"height": 0, "width": 28}}, "size.height is 0"),
        ({"crop_size": 28, "do_center_crop": None}, "do_center_crop is missing"),
        ({"do_center_crop": True}, "crop_size.height is missing"),
    ],
)
def test_what_no_recipe_can_follow_is_refused(change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    file = saved(FIXED["siglip"], tmp_path)
    with pytest.raises(ConfigUnsupported, match=complaint):
        Fixed.read(ConfigFile({**file.values, **change}, file.path))


def test_a_folder_that_says_nothing_of_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text('{"processor_class": "X"}')
    with pytest.raises(CheckpointNotFound, match=r"preprocessor_config\.json"):
        load(tmp_path)
