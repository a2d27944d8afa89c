"""Frames as PyAV's plain decoding and transformers' reading give them, chosen as vLLM does; hostile files refused."""

import tracemalloc
from contextlib import suppress
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.video_utils import read_video_pyav

from bestiary.errors import RequestError
from bestiary.media import MediaLimits, Sampling, load_video

FORMATS = [
    ("mp4", "libx264"),
    ("matroska", "libx264"),
    ("webm", "libvpx-vp9"),
    ("avi", "mpeg4"),
    ("mpegts", "mpeg2video"),
]


def film(count: int = 12, height: int = 32, width: int = 48) -> np.ndarray:
    """Each frame has a brightness of its own."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[:] = (20 * (np.arange(count) % 12) + 10)[:, None, None, None]
    frames[:, :8, :8, 0] = 255
    return frames


def stored(
    frames: np.ndarray,
    form: str = "mp4",
    codec: str = "libx264",
    rate: int = 10,
    options: dict | None = None,
) -> bytes:
    out = BytesIO()
    with av.open(out, "w", format=form) as container:
        stream = container.add_stream(codec, rate=Fraction(rate), options=options or {})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


FILM = stored(film())


def shown_turned(data: bytes, turn: int) -> bytes:
    """The same packets, to be shown turned: two runs of an encoder need not agree to the last bit."""
    out = BytesIO()
    with av.open(BytesIO(data)) as source, av.open(out, "w", format="mp4") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(turn)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    return out.getvalue()


def brightness(frames: np.ndarray) -> list[int]:
    return [round((int(frame[20, 30, 1]) - 10) / 20) for frame in frames]


@pytest.mark.parametrize(("form", "codec"), FORMATS)
def test_the_chosen_frames_are_kept_with_their_times(form: str, codec: str, tmp_path: Path) -> None:
    path = tmp_path / "film"
    path.write_bytes(stored(film(), form, codec, rate=25))
    video = load_video(path, sampling=Sampling(num_frames=4))
    assert (video.frames.dtype, video.frames.shape, video.fps) == (np.uint8, (4, 32, 48, 3), 25.0)
    assert brightness(video.frames) == [0, 3, 7, 11]
    np.testing.assert_allclose(video.timestamps, np.array([0, 3, 7, 11]) / 25, atol=2e-3)


@pytest.mark.parametrize("places", [[0], [11], [1, 2, 9], list(range(12))])
def test_pixels_are_those_that_transformers_reads(places: list[int], tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(FILM)
    expected, _ = read_video_pyav(str(path), lambda metadata, **_: places)
    assert np.array_equal(load_video(FILM, sampling=lambda total, fps: places).frames, expected)


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 60), *[st.none() | st.integers(1, 40)] * 3)
def test_frames_are_chosen_as_vllm_does(
    total: int, rate: int, num_frames: int | None, fps: int | None, most: int | None
) -> None:
    places = Sampling(num_frames=num_frames, fps=fps, max_frames=most)(total, float(rate))
    bounds = [total, *(b for b in (num_frames, most) if b), *([int(total / rate * fps)] if fps else [])]
    assert places == np.linspace(0, total - 1, max(1, min(bounds)), dtype=int).tolist()
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("kept", [1, 2, 5])
def test_frames_that_are_not_chosen_are_not_kept(kept: int) -> None:
    data = stored(film(120, 240, 320), codec="mpeg4")
    tracemalloc.start()
    try:
        assert load_video(data, sampling=Sampling(num_frames=kept)).frames.shape[0] == kept
        assert tracemalloc.get_traced_memory()[1] < (kept + 4) * 240 * 320 * 3 + len(data) * 3
    finally:
        tracemalloc.stop()


def test_a_model_may_want_a_frame_twice() -> None:
    assert brightness(load_video(FILM, sampling=lambda total, fps: [0, 0, 5, total - 1, total - 1]).frames) == [
        0,
        0,
        5,
        11,
        11,
    ]


@pytest.mark.parametrize(("turn", "quarters"), [(90, 1), (180, 2), (270, 3)])
def test_a_film_of_a_turned_telephone_is_turned_upright(turn: int, quarters: int) -> None:
    turned, plain = load_video(shown_turned(FILM, turn)).frames, load_video(FILM).frames
    np.testing.assert_array_equal(turned, np.rot90(plain, quarters, axes=(1, 2)))


def test_arrays_and_lists_of_images_are_chosen_from_too() -> None:
    frames = film()
    images = [Image.fromarray(frame) for frame in frames]
    for source in (frames, images, (frames, 10.0), (images, 10.0)):
        video = load_video(source, sampling=Sampling(num_frames=3))
        assert np.array_equal(video.frames, frames[[0, 5, 11]])
        assert (video.timestamps is None) == (video.fps is None)
    assert video.timestamps is not None
    assert video.timestamps.tolist() == [0.0, 0.5, 1.1]
    assert brightness(load_video((frames, 10.0), sampling=Sampling(fps=2)).frames) == [0, 11]


def test_a_file_cut_short_gives_the_frames_that_it_has_or_is_refused() -> None:
    data = stored(film(60, 64, 64), "matroska", "mpeg4")
    lengths = set()
    for end in range(0, len(data), len(data) // 25):
        try:
            lengths.add(len(load_video(data[:end], sampling=Sampling(num_frames=50)).frames))
        except RequestError as error:
            assert "0x" not in str(error)
    assert len(lengths) > 5


def test_of_a_film_that_was_trimmed_only_what_is_shown_counts() -> None:
    """Trimming keeps the packets before the cut: the choice is made among the frames that come out."""
    out, options = BytesIO(), {"use_editlist": "1", "avoid_negative_ts": "disabled"}
    with (
        av.open(BytesIO(stored(film(), options={"bf": "0"}))) as whole,
        av.open(out, "w", "mp4", options=options) as trimmed,
    ):
        stream = trimmed.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.size:
                packet.pts -= int(0.4 / packet.time_base)
                packet.dts, packet.stream = packet.pts, stream
                trimmed.mux(packet)
    video = load_video(out.getvalue(), sampling=Sampling(num_frames=3))
    assert brightness(video.frames) == [4, 7, 11]
    assert video.timestamps is not None
    np.testing.assert_allclose(video.timestamps, [0, 0.3, 0.7], atol=2e-3)


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"", "begins like no format"),
        (PLAYLIST, "send one of mov, matroska, avi, mpegts, gif"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "begins like no format"),
        (FILM[:200], "cannot be decoded"),
        (b"\x1aE\xdf\xa3" + bytes(100), "cannot be decoded|no pictures"),
        (np.zeros((2, 4, 4, 3), np.float32), r"give \[T, H, W, 3\] of uint8"),
        (np.zeros((4, 4, 3), np.uint8), r"give \[T, H, W, 3\] of uint8"),
        (np.zeros((0, 4, 4, 3), np.uint8), "nothing to see"),
        (np.zeros((2, 0, 4, 3), np.uint8), "nothing to see"),
        ([], "nothing to see"),
        ((film(), 0), "has 0 frames a second"),
        ((film(), -1.0), "frames a second"),
        ((film(), float("nan")), "has nan frames a second"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (4, 5))], "frames of several sizes"),
        (7, "the video is a int"),
    ],
)
def test_what_is_no_video_is_refused_with_the_reason(source: object, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        load_video(source)


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("max_video_bytes", len(FILM) - 1),
        ("max_video_seconds", 1.1),
        ("max_video_source_frames", 11),
        ("max_video_frames", 11),
        ("max_video_frame_pixels", 32 * 48 - 1),
        ("max_video_pixels", 32 * 48 * 12 - 1),
        ("max_video_decode_seconds", 1e-9),
    ],
)
def test_every_limit_holds_and_its_error_names_it(limit: str, value: float) -> None:
    with pytest.raises(RequestError, match=rf"raise MediaLimits\({limit}=\.\.\.\)"):
        load_video(FILM, limits=MediaLimits(**{limit: value}))
    roomy = value + 1 if limit != "max_video_decode_seconds" else 60
    assert load_video(FILM, limits=MediaLimits(**{limit: roomy})).frames.shape[0] == 12


@pytest.mark.parametrize("name", ["num_frames", "fps", "max_frames"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "2", True])
def test_a_sampling_that_cannot_be_is_refused(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"sampling: {name} is"):
        Sampling(**{name: value})


def test_sampling_by_time_needs_to_know_the_time() -> None:
    with pytest.raises(RequestError, match=r"give \(frames, fps\)"):
        load_video(film(), sampling=Sampling(fps=1))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_file_never_raises_anything_but_a_request_error(data: st.DataObject) -> None:
    content = bytearray(FILM)
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with suppress(RequestError):
        assert load_video(bytes(content), sampling=Sampling(num_frames=3)).frames.dtype == np.uint8
