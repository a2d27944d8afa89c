"""PaliGemma (Beyer et al. 2024, arXiv 2407.07726): SigLIP's vectors, in a Gemma's width, before its tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from bestiary.blocks import Decoder, Encoder, Linear
from bestiary.checkpoint import ConfigFile, Names
from bestiary_towers import languages, siglip

__all__ = ["NAMES", "Config", "PaliGemmaEncoder", "describe"]


@dataclass(frozen=True)
class Config:
    """What config.json says of a PaliGemma."""

    text: ConfigFile
    vision: siglip.Config
    image_token: int

    @classmethod
    def read(cls, file: ConfigFile) -> Self:
        """Raises ConfigUnsupported for a tower or a language model that no published PaliGemma has."""
        vision = file.section("vision_config")
        vision.expect("model_type", "siglip_vision_model", default="siglip_vision_model")
        tied = file.get("tie_word_embeddings", bool)
        return cls(
            text=languages.read(file.section("text_config"), "gemma", "gemma2", tied=tied),
            vision=siglip.Config.read(vision),
            image_token=file.get(("image_token_index", "image_token_id"), int, 256000),
        )


class PaliGemmaEncoder(Encoder):
    """What comes out of the tower's last norm, in the language model's width."""

    def __init__(self, vision: siglip.Config, width: int) -> None:
        super().__init__()
        self.tower = siglip.describe(vision, normed=True)
        self.projector = Linear(vision.width, width, "whole", bias=True)

    def forward(self, modality: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """[patches, width] of a picture [3, height, width]."""
        y_TD: Tensor = self.projector(self.tower(inputs["pixels"][None])[0])
        return y_TD


def describe(c: Config) -> Decoder:
    """The tree of a PaliGemma: a Gemma's, with an encoder."""
    decoder = languages.describe(c.text).tree
    decoder.encoder = PaliGemmaEncoder(c.vision, decoder.embed.width)
    return decoder


def NAMES(c: Config) -> Names:
    """Of files as published and as transformers saves them, in which all but the head lies one level deeper."""
    text = languages.describe(c.text).names
    projector = Names(("model.multi_modal_projector.linear", "encoder.projector"))
    seen = (siglip.NAMES.under("model.vision_tower.", "encoder.tower.") + projector).optional("model.")
    return seen + text.under("language_model.", "") + text.behind("model.", "model.language_model.")
