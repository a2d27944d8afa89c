"""Audio from whatever the user gave: mono float32 at the rate that a model asks for. Knows no model, no spectrum."""

from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

from bestiary.errors import RequestError
from bestiary.media.decoders import decoding, extra, kind_of
from bestiary.media.limits import MediaLimits
from bestiary.media.sources import Sources, read

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Audio", "load_audio"]

_WHAT = "the audio"
_SIGNATURES = (
    (8, b"WAVE", "WAV"),
    (0, b"fLaC", "FLAC"),
    (0, b"OggS", "Ogg (Vorbis, Opus)"),
    (8, b"AIFF", "AIFF"),
    (0, b"ID3", "MP3"),
    *((0, bytes((0xFF, second)), "MP3") for second in (0xFB, 0xFA, 0xF3, 0xF2, 0xE3, 0xE2)),
)


@dataclass(frozen=True, slots=True, eq=False)
class Audio:
    """One channel: `samples` [T] float32, mostly within -1 and 1, `rate` of them a second."""

    samples: "NDArray[np.float32]"
    rate: int

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return len(self.samples) / self.rate


class _Bytes(BytesIO):
    """Bytes that stay where they are when a damaged header makes libsndfile look before their beginning.

    An error in there would not reach us: it comes out of a callback, which prints it.
    """

    def seek(self, offset: int, whence: int = 0, /) -> int:
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return self.tell()


def load_audio(
    source: Any,
    rate: int,
    *,
    limits: MediaLimits = MediaLimits(),  # noqa: B008 - frozen
    sources: Sources = Sources(),  # noqa: B008 - frozen
) -> Audio:
    """One recording at `rate` samples a second.

    `source` is (array, rate) with an array [T] or [T, channels] of floats or of integers in their full range, the
    bytes of a file, a path, or an address (see `Sources`). An array or a list alone is taken to have the model's rate,
    as in vLLM. Channels are averaged, then resampled by soxr at its high
    quality, as `transformers.audio_utils.load_audio` does it. Raises RequestError, and CapabilityMissing without
    soundfile or soxr.
    """
    with extra("audio"):
        import numpy as np
        import soxr
    if isinstance(source, list) or hasattr(source, "__array_interface__"):
        source = (source, rate)
    if isinstance(source, tuple):
        mono, given = _from_array(source, limits)
    else:
        mono, given = _decode(read(source, "audio", limits, sources), limits)
    if not np.isfinite(mono).all():
        raise RequestError(f"{_WHAT} has samples that are NaN or infinite")
    if given != rate:
        mono = soxr.resample(mono, given, rate, quality="HQ")
    if not len(mono):
        raise RequestError(f"{_WHAT} has no samples at {rate:,} Hz: it is empty or too short")
    return Audio(mono, rate)


def _check_header(frames: int, channels: int, rate: float, limits: MediaLimits) -> int:
    """The rate, once what costs time and memory is known to be little."""
    if isinstance(rate, bool) or not rate >= 1 or rate != int(rate):
        raise RequestError(f"{_WHAT} has {rate!r} samples a second: give a whole number above 0")
    limits.check("max_audio_rate", rate, _WHAT)
    limits.check("max_audio_channels", channels, _WHAT)
    limits.check("max_audio_seconds", frames / rate, _WHAT)
    limits.check("max_audio_samples", frames * channels, _WHAT)
    return int(rate)


def _from_array(source: tuple[Any, ...], limits: MediaLimits) -> "tuple[NDArray[np.float32], int]":
    """Mono samples and their rate, of (array, rate)."""
    import numpy as np

    if len(source) != 2 or isinstance(source[1], str) or not hasattr(source[1], "__index__"):
        raise RequestError(f"{_WHAT} is a tuple, but not (array, samples a second)")
    with decoding(_WHAT):
        samples = np.asarray(source[0])
    if samples.ndim not in (1, 2) or samples.dtype.kind not in "fiu":
        raise RequestError(
            f"{_WHAT} is an array {samples.shape} of {samples.dtype}: give [T] or [T, channels] of floats or integers"
        )
    columns = samples.reshape(len(samples), -1) if samples.size else samples.reshape(0, 1)
    rate = _check_header(len(columns), columns.shape[1], source[1], limits)
    if samples.dtype.kind in "iu":
        info = np.iinfo(samples.dtype)
        half = (int(info.max) - int(info.min) + 1) // 2
        columns = (columns.astype(np.float64) - (half if samples.dtype.kind == "u" else 0)) / half
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
        return columns.mean(axis=1, dtype=np.float64).astype(np.float32), rate


def _decode(data: bytes, limits: MediaLimits) -> "tuple[NDArray[np.float32], int]":
    """Mono samples and their rate, of a file's bytes."""
    with extra("audio"):
        import soundfile
    kind_of(data, _SIGNATURES, _WHAT)
    with decoding(_WHAT), soundfile.SoundFile(_Bytes(data)) as file:
        rate = _check_header(file.frames, file.channels, file.samplerate, limits)
        # All at once: soundfile seeks between two reads, and an MP3 does not go on where it was.
        samples = file.read(dtype="float32", always_2d=True)
        if len(samples) < file.frames:
            raise RequestError(f"{_WHAT} breaks off after {len(samples):,} of {file.frames:,} samples: send all of it")
        return samples.mean(axis=1), rate
