"""Video from whatever the user gave: the frames that a model looks at, with their times. Knows no model.

Frames are chosen before they are decoded: one pass over the file counts them without decoding, a second decodes and
keeps the chosen ones alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from math import isfinite
from time import monotonic
from typing import TYPE_CHECKING, Any

from bestiary.errors import RequestError
from bestiary.media.decoders import decoding, extra, kind_of
from bestiary.media.image import load_image
from bestiary.media.limits import MediaLimits
from bestiary.media.sources import Sources, read

if TYPE_CHECKING:
    import numpy as np
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from numpy.typing import NDArray

__all__ = ["Choice", "Sampling", "Video", "load_video"]

_WHAT = "the video"
#: Names of FFmpeg's readers. None of them follows an address that stands in the file, as playlists do.
_SIGNATURES = (
    *((4, box, "mov") for box in (b"ftyp", b"moov", b"mdat", b"wide")),
    (0, b"\x1aE\xdf\xa3", "matroska"),
    (8, b"AVI ", "avi"),
    (0, b"\x47", "mpegts"),
    (0, b"GIF8", "gif"),
)
_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "mpeg2video", "mpeg1video", "mjpeg", "gif")

#: From a video's number of frames and its frames a second (None: unknown) to the places of those to keep, rising.
Choice = Callable[[int, float | None], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which frames are kept: evenly spread, the first and the last among them; with nothing set, all.

    Each setting is an upper bound and the smallest wins, as in vLLM: `num_frames` of them, `fps` a second, at most
    `max_frames`. A model that rounds in its own way gives a `Choice` of its own instead.
    """

    num_frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None

    def __post_init__(self) -> None:
        for name, kind in (("num_frames", int), ("fps", int | float), ("max_frames", int)):
            value = getattr(self, name)
            is_number = isinstance(value, kind) and not isinstance(value, bool)
            if value is not None and not (is_number and value > 0 and isfinite(value)):
                raise RequestError(f"sampling: {name} is {value!r}: give a number above 0")

    def __call__(self, total: int, fps: float | None) -> list[int]:
        """The places of the frames to keep, out of `total`. Raises RequestError where `fps` is needed and unknown."""
        import numpy as np

        bounds = [bound for bound in (self.num_frames, self.max_frames) if bound is not None]
        if self.fps is not None:
            if fps is None:
                raise RequestError(f"{_WHAT} does not say its frames a second, by which to sample: give (frames, fps)")
            bounds.append(int(min(total / fps * self.fps, total)))
        count = max(1, min([total, *bounds]))
        return [int(place) for place in np.linspace(0, total - 1, count, dtype=np.int64)]


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """`frames` [T, H, W, 3] uint8, upright RGB. `fps` is the source's, before frames were left out; None: unknown."""

    frames: "NDArray[np.uint8]"
    fps: float | None
    #: [T] float64 seconds since the first frame of the source; None where `fps` is.
    timestamps: "NDArray[np.float64] | None"


def load_video(
    source: Any,
    *,
    sampling: Choice = Sampling(),
    limits: MediaLimits = MediaLimits(),  # noqa: B008 - frozen
    sources: Sources = Sources(),  # noqa: B008 - frozen
) -> Video:
    """One video, of which the frames that `sampling` chooses are kept.

    `source` is an array [T, H, W, 3] of uint8, a list of PIL images, either of them as (frames, frames a second), the
    bytes of a file, a path, or an address (see `Sources`). Raises RequestError, and CapabilityMissing without PyAV.
    """
    with extra("video"):
        import numpy as np  # noqa: F401 - asked for here, used below
    if isinstance(source, str | bytes | bytearray | memoryview) or hasattr(source, "__fspath__"):
        return _decode(read(source, "video", limits, sources), sampling, limits)
    frames, fps = source, None
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], int | float):
        frames, fps = source[0], _check_rate(source[1])
    return _from_frames(frames, fps, sampling, limits)


def _check_rate(fps: float) -> float:
    if isinstance(fps, bool) or not (fps > 0 and isfinite(fps)):
        raise RequestError(f"{_WHAT} has {fps!r} frames a second: it must be a number above 0")
    return float(fps)


def _choose(sampling: Choice, total: int, fps: float | None, pixels: int, limits: MediaLimits) -> Sequence[int]:
    """The chosen places, once keeping them is known to be within the limits."""
    limits.check("max_video_source_frames", total, _WHAT)
    limits.check("max_video_frame_pixels", pixels, _WHAT)
    if fps is not None:
        limits.check("max_video_seconds", total / fps, _WHAT)
    if total < 1 or pixels < 1:
        raise RequestError(f"{_WHAT} has no frames, or frames without pixels: there is nothing to see")
    places = sampling(total, fps)
    limits.check("max_video_frames", len(places), _WHAT)
    limits.check("max_video_pixels", len(places) * pixels, _WHAT)
    return places


def _from_frames(frames: Any, fps: float | None, sampling: Choice, limits: MediaLimits) -> Video:
    import numpy as np

    if isinstance(frames, np.ndarray):
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise RequestError(f"{_WHAT} is an array {frames.shape} of {frames.dtype}: give [T, H, W, 3] of uint8")
        places = _choose(sampling, len(frames), fps, frames.shape[1] * frames.shape[2], limits)
        kept = frames[list(places)]
    elif isinstance(frames, Sequence) and all(hasattr(frame, "getbands") for frame in frames):
        pixels = max((frame.width * frame.height for frame in frames), default=0)
        places = _choose(sampling, len(frames), fps, pixels, limits)
        images = [np.asarray(load_image(frames[place], limits=limits)) for place in places]
        if len({image.shape for image in images}) > 1:
            raise RequestError(f"{_WHAT} has frames of several sizes: give them one")
        kept = np.stack(images)
    else:
        raise RequestError(f"{_WHAT} is a {type(frames).__name__}: give frames, bytes, a path or an address")
    return Video(kept, fps, None if fps is None else np.array(places, np.float64) / fps)


def _decode(data: bytes, sampling: Choice, limits: MediaLimits) -> Video:
    container_format = kind_of(data, _SIGNATURES, _WHAT)
    deadline = monotonic() + limits.max_video_decode_seconds
    with decoding(_WHAT):
        with _opened(data, container_format, limits) as (container, stream):
            rate = _check_rate(float(stream.average_rate or stream.guessed_rate or 0))
            pixels, total = stream.width * stream.height, 0
            for packet in container.demux(stream):
                total += packet.size > 0
                limits.check("max_video_source_frames", total, _WHAT)
        places = _choose(sampling, total, rate, pixels, limits)
        try:
            return _pick(data, container_format, places, rate, limits, deadline)
        except _FewerFrames as fewer:
            # Packets that show nothing, or a file that was cut: choose again among the frames that there are.
            places = _choose(sampling, fewer.count, rate, pixels, limits)
            return _pick(data, container_format, places, rate, limits, deadline)


class _FewerFrames(Exception):
    """The file has fewer frames than packets."""

    def __init__(self, count: int) -> None:
        super().__init__(f"it has only {count:,} frames")
        self.count = count


@contextmanager
def _opened(data: bytes, name: str, limits: MediaLimits) -> "Iterator[tuple[InputContainer, VideoStream]]":
    """A file's first video stream, before any frame is asked for."""
    with extra("video"):
        import av
    options = {
        "codec_whitelist": ",".join(_CODECS),
        "protocol_whitelist": "none",  # no file or address beside these bytes is opened, whatever they name
        # What decoders allocate is wider and higher than the picture; the exact limit is checked below.
        "max_pixels": str(2 * int(limits.max_video_frame_pixels) + 2**16),
    }
    with av.open(BytesIO(data), mode="r", format=name, options=options) as container:
        if not container.streams.video:
            raise RequestError(f"{_WHAT} has no pictures: send a file with a video stream")
        stream = container.streams.video[0]
        codec = stream.codec_context
        if codec is None or codec.name not in _CODECS:
            raise RequestError(f"{_WHAT} is not in a coding that is read here: use one of {', '.join(_CODECS)}")
        limits.check("max_video_frame_pixels", stream.width * stream.height, _WHAT)
        if stream.duration is not None and stream.time_base is not None:
            limits.check("max_video_seconds", float(stream.duration * stream.time_base), _WHAT)
        codec.options = {"max_pixels": options["max_pixels"]}
        stream.thread_type = "AUTO"
        yield container, stream


def _pick(data: bytes, name: str, places: Sequence[int], fps: float, limits: MediaLimits, deadline: float) -> Video:
    """Decode from the start up to the last chosen frame and keep the chosen ones."""
    import numpy as np

    kept: NDArray[np.uint8] | None = None
    times, count, seen, first = np.empty(len(places)), 0, -1, 0.0
    with _opened(data, name, limits) as (container, stream):
        for seen, frame in enumerate(container.decode(stream)):
            if monotonic() > deadline:
                raise RequestError(
                    f"{_WHAT} takes longer to decode than the {limits.max_video_decode_seconds:,} seconds of "
                    f"max_video_decode_seconds: send less, or raise MediaLimits(max_video_decode_seconds=...)"
                )
            first = (frame.time or 0.0) if seen == 0 else first
            if seen != places[count]:
                continue
            picture = _upright(frame, limits)
            kept = np.empty((len(places), *picture.shape), np.uint8) if kept is None else kept
            if picture.shape != kept.shape[1:]:
                raise RequestError(f"{_WHAT} changes the size of its frames at frame {seen:,}: give it one size")
            while count < len(places) and places[count] == seen:  # a model may want a frame twice
                kept[count] = picture
                times[count] = seen / fps if frame.time is None else frame.time - first
                count += 1
            if count == len(places):
                return Video(kept, fps, times)
    raise _FewerFrames(seen + 1)


def _upright(frame: "VideoFrame", limits: MediaLimits) -> "NDArray[np.uint8]":
    """[H, W, 3], turned as the file says that it is shown."""
    import numpy as np

    limits.check("max_video_frame_pixels", frame.width * frame.height, _WHAT)
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)).astype(np.uint8, copy=False)
