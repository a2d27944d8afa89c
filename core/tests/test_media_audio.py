"""Audio as transformers loads it, and hostile audio refused."""

import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.audio_utils import load_audio as reference

from bestiary.errors import RequestError
from bestiary.media import MediaLimits, load_audio

RNG = np.random.default_rng(0)
FORMATS = [
    ("WAV", "PCM_16"),
    ("WAV", "FLOAT"),
    ("FLAC", "PCM_24"),
    ("OGG", "VORBIS"),
    ("AIFF", "PCM_16"),
    ("MP3", None),
]


def tone(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    times = np.arange(int(seconds * rate))[:, None] / rate
    return (0.3 * np.sin(2 * np.pi * times * (440 + 110 * np.arange(channels)))).astype(np.float32)


def stored(samples: np.ndarray, rate: int, form: str = "WAV", subtype: str | None = "FLOAT") -> bytes:
    out = BytesIO()
    soundfile.write(out, samples, rate, format=form, subtype=subtype)
    return out.getvalue()


@pytest.mark.parametrize(("form", "subtype"), FORMATS)
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_samples_are_those_that_transformers_loads(
    form: str, subtype: str | None, channels: int, rate: int, tmp_path: Path
) -> None:
    path = tmp_path / f"audio.{form.lower()}"
    path.write_bytes(stored(tone(1.5, rate, channels), rate, form, subtype))
    audio = load_audio(path, 16_000)
    expected = reference(str(path), sampling_rate=16_000, backend="soundfile")
    assert (audio.samples.dtype, audio.samples.ndim, audio.rate) == (np.float32, 1, 16_000)
    assert np.abs(audio.samples).max() > 0.2
    np.testing.assert_allclose(audio.samples, expected, atol=1e-6)
    np.testing.assert_array_equal(load_audio(path.read_bytes(), 16_000).samples, audio.samples)


@given(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=50))
def test_integers_are_a_share_of_their_range(values: list[int]) -> None:
    wide = np.array(values, np.int16)
    expected = wide.astype(np.float64) / 2**15
    for array in (wide, wide.astype(np.int32) * 2**16, (wide.astype(np.int32) + 2**15).astype(np.uint16), expected):
        np.testing.assert_array_equal(load_audio((array, 16_000), 16_000).samples, expected.astype(np.float32))


def test_channels_are_the_second_axis_and_are_averaged() -> None:
    array = np.array([[0.5, 0.0], [1.0, -1.0], [0.25, 0.75]])
    audio = load_audio((array, 8_000), 8_000)
    assert audio.samples.tolist() == [0.25, 0.0, 0.5]
    assert audio.seconds == 3 / 8_000


@pytest.mark.parametrize(
    ("array", "rate", "reason"),
    [
        (np.array([0.0, np.nan]), 16_000, "NaN or infinite"),
        (np.array([0.0, np.inf]), 16_000, "NaN or infinite"),
        (np.array([1e300]), 16_000, "NaN or infinite"),
        (np.zeros(0), 16_000, "empty or too short"),
        (np.zeros((0, 2)), 16_000, "empty or too short"),
        (np.zeros(1), 192_000, "empty or too short"),
        (np.zeros(9), 0, "samples a second"),
        (np.zeros(9), -1, "samples a second"),
        (np.zeros(9), 192_001, "max_audio_rate"),
        (np.zeros(9), "16000", "not \\(array, samples a second\\)"),
        (np.zeros(9), 16_000.5, "not \\(array, samples a second\\)"),
        (np.zeros(601), 1, "seconds: 601.0, more than the 600.0 of max_audio_seconds"),
        (np.zeros((2, 16_000)), 16_000, "max_audio_channels"),
        (np.broadcast_to(np.float32(0), (16_000_001, 8)), 192_000, "max_audio_samples"),
        (np.zeros((2, 2, 2)), 16_000, r"give \[T\] or \[T, channels\]"),
        (np.zeros(4, complex), 16_000, "complex128"),
        (["a"], 16_000, "of <U1"),
        ([[1.0], [1.0, 2.0]], 16_000, "cannot be decoded"),
    ],
)
def test_an_array_that_is_no_audio_is_refused(array: object, rate: object, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        load_audio((array, rate), 16_000)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "begins like no format"),
        (b"hello" * 9, "send one of WAV, FLAC"),
        (b"RIFF\xff\xff\xff\xffWAVE", "cannot be decoded"),
        (stored(tone(0, 16_000), 16_000), "empty or too short"),
        (stored(tone(2, 8_000), 8_000), "max_audio_seconds"),
        (stored(tone(0.1, 8_000, 3), 8_000), "max_audio_channels"),
        (stored(np.array([np.nan, 0.0]), 8_000), "NaN or infinite"),
        (stored(tone(0.1, 8_000), 8_000).replace(struct.pack("<I", 8_000), bytes(4)), "cannot be decoded|a second"),
        (stored(tone(0.1, 8_000), 8_000).replace(struct.pack("<I", 8_000), b"\xff\xff\xff\x7f"), "max_audio_rate"),
    ],
    # Not by their bytes: a float WAV holds the second of its making, and test workers must collect alike.
    ids=["empty", "text", "header", "no_samples", "long", "channels", "nan", "rate_zero", "rate_huge"],
)
def test_a_file_that_is_no_audio_within_the_limits_is_refused(data: bytes, reason: str) -> None:
    limits = MediaLimits(max_audio_seconds=1.0, max_audio_channels=2)
    with pytest.raises(RequestError, match=reason):
        load_audio(data, 16_000, limits=limits)


def test_an_hour_of_silence_in_few_bytes_is_refused_by_its_header() -> None:
    data = stored(np.zeros(3600 * 8_000, np.int16), 8_000, "FLAC", "PCM_16")
    assert len(data) < 2**20
    with pytest.raises(RequestError, match=r"seconds: 3,600.0, more than the 600.0 of max_audio_seconds"):
        load_audio(data, 16_000)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_file_never_raises_anything_but_a_request_error(data: st.DataObject) -> None:
    form, subtype = data.draw(st.sampled_from(FORMATS))
    content = bytearray(stored(tone(0.1, 16_000, 2), 16_000, form, subtype))
    for _ in range(data.draw(st.integers(0, 8))):
        content[data.draw(st.integers(0, min(len(content) - 1, 300)))] = data.draw(st.integers(0, 255))
    try:
        audio = load_audio(bytes(content[: data.draw(st.integers(0, len(content)))]), 8_000)
        assert np.isfinite(audio.samples).all()
    except RequestError:
        pass
