"""Media in: what users give as image, audio or video, made into one form, within limits. Knows no model, no engine."""

from bestiary.media.attachments import Admission, Attachment
from bestiary.media.audio import Audio, load_audio
from bestiary.media.image import load_image
from bestiary.media.limits import MediaLimits, check_counts
from bestiary.media.messages import Medium, collect, fetch_all, spelled_out
from bestiary.media.sources import Sources
from bestiary.media.video import Sampling, Video, load_video

__all__ = [
    "Admission",
    "Attachment",
    "Audio",
    "MediaLimits",
    "Medium",
    "Sampling",
    "Sources",
    "Video",
    "check_counts",
    "collect",
    "fetch_all",
    "load_audio",
    "load_image",
    "load_video",
    "spelled_out",
]
