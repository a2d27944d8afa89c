"""Pixels and sizes beside transformers' image processors on Pillow: the same numbers, and not merely near ones."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size as pixtral_size
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from bestiary.errors import RequestError
from bestiary_towers import pixels
from bestiary_towers.grid import places
from bestiary_towers.pixels import CLIP_MEAN, CLIP_STD, HALF, Size

#: Square, wide, high, very wide, smaller than what it is made into, one pixel.
SIZES = [Size(64, 64), Size(50, 91), Size(91, 50), Size(17, 200), Size(9, 13), Size(1, 1)]
sizes = st.builds(Size, st.integers(1, 5000), st.integers(1, 5000))


def picture(size: Size) -> Image.Image:
    numbers = np.random.default_rng(size.area).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(numbers)


def reference(processor: Any, image: Image.Image) -> NDArray[np.float32]:
    found: NDArray[np.float32] = processor(image, return_tensors="np")["pixel_values"]
    return found


@pytest.mark.parametrize("size", SIZES)
def test_clips_pixels_are_the_references(size: Size) -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    image = picture(size)
    scaled = pixels.resize(image, pixels.scale_shortest(size, 32))
    found = pixels.normalise(pixels.centre_crop(scaled, Size(32, 32)), CLIP_MEAN, CLIP_STD)
    assert found.dtype == np.float32 and found.shape == (3, 32, 32)
    np.testing.assert_array_equal(found, reference(processor, image)[0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop", [Size(20, 60), Size(61, 33)])
def test_a_crop_of_a_picture_that_is_too_small_is_black_around_it(size: Size, crop: Size) -> None:
    processor = CLIPImageProcessorPil(do_resize=False, crop_size={"height": crop.height, "width": crop.width})
    image = picture(size)
    found = pixels.normalise(pixels.centre_crop(image, crop), CLIP_MEAN, CLIP_STD)
    np.testing.assert_array_equal(found, reference(processor, image)[0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_siglips_pixels_are_the_references(size: Size, resample: Image.Resampling) -> None:
    processor = SiglipImageProcessorPil(size={"height": 28, "width": 42}, resample=resample)
    image = picture(size)
    found = pixels.normalise(pixels.resize(image, Size(28, 42), resample), HALF, HALF)
    np.testing.assert_array_equal(found, reference(processor, image)[0])


@pytest.mark.parametrize("size", SIZES)
def test_a_square_around_a_picture_is_the_references(size: Size) -> None:
    processor = LlavaImageProcessorPil(do_pad=True, do_resize=False, do_center_crop=False)
    image = picture(size)
    colour = [int(mean * 255) for mean in CLIP_MEAN]
    found = pixels.normalise(pixels.pad_to_square(image, colour), CLIP_MEAN, CLIP_STD)
    np.testing.assert_array_equal(found, reference(processor, image)[0])


@pytest.mark.parametrize("size", SIZES)
def test_pixtrals_pixels_are_the_references(size: Size) -> None:
    processor = PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})
    image = picture(size)
    found = pixels.normalise(pixels.resize(image, pixels.fit_edge(size, 64, 8)), CLIP_MEAN, CLIP_STD)
    np.testing.assert_array_equal(found, reference(processor, image)[0])


@pytest.mark.parametrize("size", [size for size in SIZES if size.area > 1])
def test_qwen2_vls_patches_are_the_references(size: Size) -> None:
    processor = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 256, "longest_edge": 2048})
    image = picture(size)
    expected = processor(image, return_tensors="np")
    fitted = pixels.fit_area(size, multiple=8, least=256, most=2048)
    frame = pixels.normalise(pixels.resize(image, fitted), CLIP_MEAN, CLIP_STD)
    found, grid = pixels.flatten(frame[None], patch=4, frames=2, merge=2)
    np.testing.assert_array_equal(found, expected["pixel_values"])
    assert [list(grid)] == expected["image_grid_thw"].tolist()
    assert Size(*grid[1:]) == fitted.in_patches(4)


@pytest.mark.parametrize(("frames", "steps"), [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_a_videos_patches_are_the_windows_of_a_convolution_in_merge_order(frames: int, steps: int) -> None:
    video = torch.randn(frames, 3, 16, 24)
    found, grid = pixels.flatten(video.numpy(), patch=4, frames=2, merge=2)
    assert grid == (steps, 4, 6)
    whole = torch.cat((video, video[-1:])) if frames % 2 else video
    kernel = torch.randn(5, 3, 2, 4, 4)
    windows = torch.nn.functional.conv3d(whole.transpose(0, 1)[None], kernel, stride=(2, 4, 4))[0]
    row, column = places(4, 6, 2).T
    expected = windows[:, :, row, column].permute(1, 2, 0).flatten(0, 1)
    torch.testing.assert_close(torch.from_numpy(found) @ kernel.flatten(1).T, expected, atol=1e-4, rtol=1e-4)


@given(sizes, st.sampled_from([(1024, 16), (1540, 14), (64, 32)]))
@settings(deadline=None)
def test_every_size_fits_an_edge_as_in_the_reference(size: Size, setting: tuple[int, int]) -> None:
    longest, multiple = setting
    expected = pixtral_size(np.empty((3, *size), np.bool_), longest, multiple, "channels_first")
    found = pixels.fit_edge(size, longest, multiple)
    # Of a picture so thin that nothing would be left of it, the reference makes nothing, and we make one patch.
    assert found == tuple(max(side, multiple) for side in expected)


@given(sizes, st.sampled_from([(28, 3136, 1003520), (28, 3136, 12845056), (32, 65536, 65536 * 4)]))
@settings(deadline=None)
def test_every_size_fits_an_area_as_in_the_reference(size: Size, setting: tuple[int, int, int]) -> None:
    multiple, least, most = setting
    if max(size) > 200 * min(size):
        with pytest.raises(RequestError, match="200 times"):
            pixels.fit_area(size, multiple=multiple, least=least, most=most)
    else:
        expected = smart_resize(*size, multiple, least, most)
        assert pixels.fit_area(size, multiple=multiple, least=least, most=most) == expected


def test_a_size_is_read_off_a_picture_the_other_way_round() -> None:
    assert Size.of(Image.new("RGB", (7, 3))) == Size(height=3, width=7)
