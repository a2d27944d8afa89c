"""What a prompt brings beside text: whether it may, and each item as a handle that decodes when a model asks for it.

Knows no model. Counts come before decoding, so that nobody makes us decode a thousand pictures to refuse them.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from bestiary.architecture import Architecture, Modality
from bestiary.config import EngineConfig
from bestiary.errors import RequestError
from bestiary.media.audio import Audio, load_audio
from bestiary.media.image import load_image
from bestiary.media.limits import MediaLimits, check_counts
from bestiary.media.messages import Medium, fetch_all
from bestiary.media.sources import Sources
from bestiary.media.video import Choice, Sampling, Video, load_video

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

__all__ = ["Admission", "Attachment"]


@dataclass(frozen=True, slots=True)
class Attachment:
    """One item as the user gave it. Each method decodes it, within limits, and raises RequestError where it cannot."""

    source: Any
    limits: MediaLimits = field(default_factory=MediaLimits)
    sources: Sources = field(default_factory=Sources)

    def image(self, *, alpha: str = "drop") -> "Image":
        """As `load_image`."""
        return load_image(self.source, alpha=alpha, limits=self.limits, sources=self.sources)

    def audio(self, rate: int) -> Audio:
        """As `load_audio`, at so many samples a second."""
        return load_audio(self.source, rate, limits=self.limits, sources=self.sources)

    def video(self, sampling: Choice = Sampling()) -> Video:  # noqa: B008 - frozen
        """As `load_video`, of which the chosen frames are kept."""
        return load_video(self.source, sampling=sampling, limits=self.limits, sources=self.sources)


@dataclass(frozen=True)
class Admission:
    """What the prompts of one model may bring. Without anything set: text alone."""

    modalities: Mapping[str, Modality] = field(default_factory=dict)
    #: The setting `limit_mm_per_prompt`.
    asked: Mapping[str, int] = field(default_factory=dict)
    limits: MediaLimits = field(default_factory=MediaLimits)
    sources: Sources = field(default_factory=Sources)
    #: Numbers in a vector of the language model, which ready embeddings must have; None: not known.
    width: int | None = None

    @classmethod
    def of(cls, architecture: Architecture, config: EngineConfig, width: int) -> Self:
        """For an architecture as its plugin declares it. Raises SettingError for limits that cannot be."""
        sources = Sources(
            allowed_media_domains=config.allowed_media_domains,
            allowed_local_media_path=config.allowed_local_media_path,
        )
        found = cls(architecture.modalities, config.limit_mm_per_prompt, sources=sources, width=width)
        found.check({})
        return found

    def check(self, counts: Mapping[str, int]) -> None:
        """Raise RequestError where a prompt would bring more of a modality than it may."""
        most = {name: None if modality.many else 1 for name, modality in self.modalities.items()}
        check_counts(counts, self.asked, most)

    def attachments(self, given: Any) -> dict[str, list[Attachment]]:
        """By modality, of `multi_modal_data`: one item or a list of them each."""
        if not isinstance(given, Mapping):
            raise RequestError("multi_modal_data must be a dictionary such as {'image': picture}")
        found = {str(name): _items(name, value) for name, value in given.items() if value is not None}
        self.check({name: len(items) for name, items in found.items()})
        return {name: [Attachment(item, self.limits, self.sources) for item in items] for name, items in found.items()}

    def fetched(self, media: Sequence[Medium]) -> dict[str, list[Attachment]]:
        """By modality, of the parts of a conversation."""
        self.check(Counter(medium.kind for medium in media))
        fetched = fetch_all(media, limits=self.limits, sources=self.sources)
        return {
            name: [Attachment(item, self.limits, self.sources) for item in items] for name, items in fetched.items()
        }

    def embeddings(self, given: Any) -> "dict[str, list[Tensor] | dict[str, Tensor]]":
        """By modality, of `multi_modal_embeds`: a list of [vectors, width], or by name what a model's plugin wants."""
        if not isinstance(given, Mapping):
            raise RequestError("multi_modal_embeds must be a dictionary such as {'image': [vectors]}")
        for name in given:
            if name not in self.modalities or not self.modalities[name].embeddings:
                raise RequestError(f"the model takes no ready embeddings of {name}: send it under multi_modal_data")
        found = {str(name): self._vectors(name, value) for name, value in given.items() if value is not None}
        self.check({name: len(items) for name, items in found.items() if isinstance(items, list)})
        return found

    def _vectors(self, name: str, value: Any) -> "list[Tensor] | dict[str, Tensor]":
        if isinstance(value, Mapping):
            return {
                str(key): self.vectors(name, tensor) if key == f"{name}_embeds" else _dense(f"{name}: {key}", tensor)
                for key, tensor in value.items()
            }
        items = [value] if getattr(value, "ndim", 0) == 2 else value
        if isinstance(items, str) or not isinstance(items, Iterable):
            raise RequestError(f"the embeddings of {name} are a {type(value).__name__}: give a list of tensors")
        return [self.vectors(name, item) for item in items]

    def vectors(self, name: str, value: Any) -> "Tensor":
        """One item's vectors, checked: [vectors, width], finite numbers."""
        found = _dense(name, value)
        shape = tuple(found.shape)
        if len(shape) != 2 or not shape[0] or (self.width is not None and shape[1] != self.width):
            raise RequestError(
                f"the embeddings of {name} have the shape {shape}: give [vectors, {self.width or 'width'}], "
                "and at least one vector"
            )
        if not found.is_floating_point() or not bool(found.isfinite().all()):
            raise RequestError(f"the embeddings of {name} must be finite floating-point numbers")
        return found


def _dense(name: str, value: Any) -> "Tensor":
    """A plain tensor: anything else might have more behind it than its shape says."""
    import torch

    if type(value) is torch.Tensor and value.layout is torch.strided and not (value.is_quantized or value.is_meta):
        return value.detach()
    raise RequestError(f"the embeddings of {name} are a {type(value).__name__}: give a dense torch.Tensor")


def _items(modality: str, value: Any) -> list[Any]:
    """One item or a list of them, told apart as vLLM does: a video may be a list of frames, audio one of samples."""
    if not isinstance(value, list):
        is_stack = modality == "video" and getattr(value, "ndim", 0) == 5
        return list(value) if is_stack else [value]
    first = value[0] if value else None
    is_frames = modality == "video" and hasattr(first, "getbands")
    is_samples = modality == "audio" and isinstance(first, int | float)
    return [value] if is_frames or is_samples else value
