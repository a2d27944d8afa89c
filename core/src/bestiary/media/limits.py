"""How much a user's media may cost, and how many of them a prompt may bring. Knows no decoder."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from bestiary.errors import RequestError, SettingError

__all__ = ["MediaLimits", "check_counts"]

_MEBI = 2**20


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """Bounds of one item, checked before it is decoded where its header tells, and while it is decoded everywhere.

    The defaults suit a server that strangers use: no item takes more than about two gigabytes while it is read.
    """

    max_image_bytes: int = 32 * _MEBI
    #: Width times height. Pillow has a bound of its own above this one, PIL.Image.MAX_IMAGE_PIXELS.
    max_image_pixels: int = 64_000_000
    max_audio_bytes: int = 64 * _MEBI
    max_audio_seconds: float = 600.0
    max_audio_channels: int = 8
    #: Samples a second.
    max_audio_rate: int = 192_000
    #: Of all channels together.
    max_audio_samples: int = 128_000_000
    max_video_bytes: int = 256 * _MEBI
    max_video_seconds: float = 600.0
    #: Of the file, kept or not: each costs the time of decoding it.
    max_video_source_frames: int = 36_000
    #: That are kept.
    max_video_frames: int = 768
    #: Of one frame, and of all that are kept.
    max_video_frame_pixels: int = 3840 * 2160
    max_video_pixels: int = 512_000_000
    #: Wall time of decoding one file, looked at after each frame.
    max_video_decode_seconds: float = 60.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise SettingError(f"MediaLimits: {field.name} is {value!r}: give a number above 0")

    def check(self, name: str, value: float, what: str) -> None:
        """Raise RequestError where `value` is above the limit of that name, or no number at all."""
        limit = getattr(self, name)
        # Not `value > limit`, which a NaN out of a header would pass.
        if not value <= limit:
            unit = name.rpartition("_")[2]
            raise RequestError(
                f"{what} has {unit}: {value:,}, more than the {limit:,} of {name}: "
                f"send less, or raise MediaLimits({name}=...)"
            )


def check_counts(counts: Mapping[str, int], asked: Mapping[str, int], model: Mapping[str, int | None]) -> None:
    """Raise RequestError where a prompt brings more items of a modality than it may.

    `asked` is the setting `limit_mm_per_prompt`, {"image": 4, ...}; what it does not name is limited by the model
    alone. `model` has every modality that the model reads, with the most items of one prompt; None: any number.
    Raises SettingError for a setting that cannot be.
    """
    for modality, limit in asked.items():
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise SettingError(f"limit_mm_per_prompt[{modality!r}] is {limit!r}: give a whole number, 0 or more")
        if modality not in model:
            raise SettingError(f"limit_mm_per_prompt names {modality!r}; the model reads: {_listed(model)}")
    for modality, count in counts.items():
        if not count:
            continue
        if modality not in model:
            raise RequestError(f"it brings {modality}; beside text the model reads: {_listed(model)}")
        own, setting = model[modality], asked.get(modality)
        if own is not None and count > own:
            raise RequestError(
                f"it brings {count} of {modality}; the model reads at most {own} in a prompt: send fewer"
            )
        if setting is not None and count > setting:
            raise RequestError(
                f"it brings {count} of {modality}, more than the {setting} allowed: "
                f"send fewer, or raise limit_mm_per_prompt[{modality!r}]"
            )


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(names)) or "nothing"
