"""Qwen2-VL (Wang et al. 2024, arXiv 2409.12191): pictures and videos of any size among a Qwen2's tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from bestiary.blocks import Decoder, Encoder
from bestiary.checkpoint import ConfigFile, Names
from bestiary.model import language_model
from bestiary_towers import qwen2_vl as tower

__all__ = ["NAMES", "Config", "Qwen2VLEncoder", "describe"]

_LANGUAGES = {"qwen2_vl": "Qwen2ForCausalLM", "qwen2_vl_text": "Qwen2ForCausalLM"}
#: Where the file leaves them out; a Qwen2 alone begins otherwise.
_LEFT_OUT = {"rope_theta": 1000000.0, "rms_norm_eps": 1e-5}


@dataclass(frozen=True)
class Config:
    """What config.json says of a Qwen2-VL."""

    text: ConfigFile
    vision: tower.Config
    image_token: int
    video_token: int

    @classmethod
    def read(cls, file: ConfigFile) -> Self:
        """Raises ConfigUnsupported for what no published Qwen2-VL has."""
        # As published the language model's keys stand beside the tower's object; transformers 5 gives them their own.
        text = file.section("text_config") if "text_config" in file else file
        vision = tower.Config.read(file.section("vision_config"))
        width = text.size("hidden_size")
        file.must(vision.outputs == width, "vision_config.hidden_size", f"is {vision.outputs}; tokens have {width}")
        return cls(
            text=text.filled({"tie_word_embeddings": file.get("tie_word_embeddings", bool, False), **_LEFT_OUT}),
            vision=vision,
            image_token=file.get("image_token_id", int, 151655),
            video_token=file.get("video_token_id", int, 151656),
        )


class Qwen2VLEncoder(Encoder):
    """The tower, one picture or video at a time."""

    def __init__(self, vision: tower.Config) -> None:
        super().__init__()
        self.tower = tower.describe(vision)

    def forward(self, modality: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """[vectors, width] of patches [T, numbers of a patch] in a grid [3]."""
        y_TD: Tensor = self.tower(inputs["patches"], inputs["grid"][None])
        return y_TD


def describe(c: Config) -> Decoder:
    """The tree of a Qwen2-VL: a Qwen2's, with an encoder."""
    decoder = language_model(c.text, _LANGUAGES).tree
    decoder.encoder = Qwen2VLEncoder(c.vision)
    return decoder


def NAMES(c: Config) -> Names:
    """Of files as published and as transformers 4.52 to 4.57 saved them, with all but the head one level deeper."""
    text = language_model(c.text, _LANGUAGES).names
    seen = tower.NAMES.under("model.visual.", "encoder.tower.").optional("model.")
    return seen + text + text.behind("model.", "model.language_model.")
