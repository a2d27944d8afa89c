"""Images as transformers loads them, and hostile ones refused before they cost anything."""

import base64
import struct
import time
import tracemalloc
import warnings
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image as reference

from bestiary.errors import RequestError
from bestiary.media import MediaLimits, load_image

RNG = np.random.default_rng(0)
SMALL = Image.fromarray(RNG.integers(0, 256, (16, 16, 3), np.uint8))


def picture(mode: str = "RGB", size: tuple[int, int] = (7, 5)) -> Image.Image:
    image = Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 4), np.uint8))
    return image.convert(mode)


def stored(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    out = BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1", "LA"])
def test_pixels_are_those_that_transformers_loads(form: str, mode: str, tmp_path: Path) -> None:
    try:
        data = stored(picture(mode), form)
    except (OSError, ValueError):
        pytest.skip(f"{form} does not store {mode}")
    path = tmp_path / "image"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Palette images with Transparency")
        expected = reference(url(data))
    for source in (data, path, str(path), url(data)):
        image = load_image(source)
        assert (image.mode, image.size) == ("RGB", (7, 5))
        assert image.tobytes() == expected.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_transformers_does(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = stored(picture(), "JPEG", exif=exif)
    image = load_image(data)
    assert image.size == ((7, 5) if orientation < 5 else (5, 7))
    assert image.tobytes() == reference(Image.open(BytesIO(data))).tobytes()


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([3, 4]))
def test_an_array_is_its_pixels(height: int, width: int, channels: int) -> None:
    array = RNG.integers(0, 256, (height, width, channels), np.uint8)
    assert np.array_equal(np.asarray(load_image(array)), array[..., :3])
    assert np.array_equal(np.asarray(load_image(array[::-1])), array[::-1, :, :3])


def test_transparency_is_dropped_or_laid_on_white() -> None:
    array = np.zeros((1, 3, 4), np.uint8)
    array[0] = (200, 0, 0, 0), (200, 0, 0, 255), (0, 100, 200, 51)
    assert np.asarray(load_image(array)).tolist() == [[[200, 0, 0], [200, 0, 0], [0, 100, 200]]]
    white = np.asarray(load_image(array, alpha="white"))
    assert white[0, :2].tolist() == [[255, 255, 255], [200, 0, 0]]
    # 51 of 255 is a fifth.
    assert np.abs(white[0, 2].astype(int) - (204, 224, 244)).max() <= 1
    with pytest.raises(RequestError, match="alpha is 'black'"):
        load_image(array, alpha="black")


def test_the_callers_image_is_not_changed_with_ours() -> None:
    own = picture()
    before = own.tobytes()
    load_image(own).paste((0, 0, 0), (0, 0, 7, 5))
    assert own.tobytes() == before


def test_of_an_animation_only_the_first_frame_is_decoded() -> None:
    frames = [Image.new("P", (300, 300), i % 256) for i in range(500)]
    for i, frame in enumerate(frames):
        frame.putpalette([i % 256, 0, 9] * 256)
    data = stored(frames[0], "GIF", save_all=True, append_images=frames[1:])
    before = time.perf_counter()
    assert load_image(data).getpixel((0, 0)) == (0, 0, 9)
    assert time.perf_counter() - before < 0.2


@pytest.mark.parametrize("side", [8_001, 9_500, 50_000, 2**31 - 1])
def test_a_bomb_is_refused_by_its_header(side: int) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match=r"max_image_pixels"):
            load_image(png(side, side, bytes(1000)))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_the_error_says_how_much_it_was_what_is_allowed_and_how_to_raise_it() -> None:
    limits = MediaLimits(max_image_pixels=34, max_image_bytes=1000)
    for source in (stored(picture()), picture(), np.asarray(picture())):
        with pytest.raises(RequestError) as caught:
            load_image(source, limits=limits)
        assert str(caught.value) == (
            "the image has pixels: 35, more than the 34 of max_image_pixels: "
            "send less, or raise MediaLimits(max_image_pixels=...)"
        )
    assert load_image(picture(), limits=MediaLimits(max_image_pixels=35)).size == (7, 5)


@pytest.mark.parametrize("form", ["path", "bytes", "url"])
def test_a_file_over_the_limit_of_bytes_is_not_opened(form: str, tmp_path: Path) -> None:
    data = stored(picture())
    path = tmp_path / "image.png"
    path.write_bytes(data)
    source = {"path": path, "bytes": data, "url": url(data)}[form]
    assert load_image(source, limits=MediaLimits(max_image_bytes=len(data))).size == (7, 5)
    with pytest.raises(RequestError, match="max_image_bytes"):
        load_image(source, limits=MediaLimits(max_image_bytes=len(data) - 1))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_file_cut_anywhere_is_refused_or_decodes_and_never_fails_otherwise(form: str) -> None:
    data = stored(picture("RGB", (40, 30)), form)
    refused = 0
    for end in range(0, len(data), max(1, len(data) // 60)):
        try:
            load_image(data[:end])
        except RequestError as error:
            refused += 1
            assert "0x" not in str(error)
    assert refused >= 30


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_file_never_raises_anything_but_a_request_error(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
    content = bytearray(stored(SMALL, form))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with suppress(RequestError):
        assert load_image(bytes(content)).mode == "RGB"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"", "of no format that is read here"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "send one of PNG, JPEG, WEBP, GIF, BMP, TIFF"),
        (png(0, 5), "broken|nothing to see"),
        (png(5, 5), "cannot be decoded"),
        (np.zeros((2, 2, 3), np.float32), r"array \(2, 2, 3\) of float32"),
        (np.zeros((2, 2), np.uint8), r"give \[height, width, 3 or 4\]"),
        (np.zeros((0, 2, 3), np.uint8), "nothing to see"),
        (7, "is a int"),
        ("no/such.png", "'no/such.png' is no file"),
        ("a\0b", "no file|cannot be read"),
        (Path("/dev/zero"), "is no file"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("data:image/png;base64", "no comma"),
        ("data:text/html;base64,aGk=", "'text/html': send image/"),
        ("https://example.com/a.png", "set allowed_media_domains"),
        ("file:///etc/passwd", "set allowed_local_media_path"),
        ("gopher://x/y", "none of data:"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(source: object, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        load_image(source)


@pytest.mark.parametrize("name", ["data", "file", "c:file"])
def test_a_path_may_look_like_an_address(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(stored(picture()))
    assert load_image(name).size == (7, 5)


def test_a_data_address_may_be_percent_encoded() -> None:
    data = stored(picture())
    address = "data:image/png," + "".join(f"%{byte:02x}" for byte in data)
    assert load_image(address).tobytes() == load_image(data).tobytes()
