"""LLaVA (Liu et al. 2023, arXiv 2310.03744): pictures, made vectors by somebody's tower, among somebody's tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from bestiary.blocks import Decoder, Encoder, Linear
from bestiary.blocks.leaf import Block
from bestiary.checkpoint import ConfigFile, Names
from bestiary_towers import clip, languages, pixtral, siglip

__all__ = ["NAMES", "Config", "LlavaEncoder", "describe"]

_TOWERS = {"clip_vision_model": clip, "siglip_vision_model": siglip, "pixtral": pixtral}


@dataclass(frozen=True)
class Config:
    """What config.json says of a LLaVA."""

    text: ConfigFile
    tower: str
    vision: Any
    #: As in vision_feature_layer.
    features: tuple[int, ...]
    keeps_class: bool
    bias: bool
    image_token: int

    @classmethod
    def read(cls, file: ConfigFile) -> Self:
        """Raises ConfigUnsupported for a tower or a language model that no published LLaVA has."""
        tower = file.expect("vision_config.model_type", *_TOWERS, default="clip_vision_model")
        file.expect("projector_hidden_act", "gelu", default="gelu")
        layers = file.values.get("vision_feature_layer", -2)
        several = isinstance(layers, list)
        strategy = file.expect("vision_feature_select_strategy", "default", "full", default="default")
        file.must(
            tower == "clip_vision_model" or strategy == "full",
            "vision_feature_select_strategy",
            f"is {strategy!r}; the tower {tower!r} has no class token to leave out: it must be 'full'",
        )
        tied = file.get("tie_word_embeddings", bool, False) or None  # false is also what files say of tied ones
        return cls(
            text=languages.read(file.section("text_config"), "llama", "mistral", "qwen2", tied=tied),
            tower=tower,
            vision=_TOWERS[tower].Config.read(file.section("vision_config")),
            features=file.need("vision_feature_layer", tuple[int, ...]) if several else (layers,),
            keeps_class=strategy == "full",
            bias=file.get("multimodal_projector_bias", bool, True),
            image_token=file.get(("image_token_index", "image_token_id"), int, 32000),
        )


class LlavaEncoder(Encoder):
    """A tower's vectors through two products, one picture at a time."""

    def __init__(self, tower: Block, inputs: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.tower = tower
        self.inputs = inputs
        self.up, self.down = Linear(inputs, width, "column", bias=bias), Linear(width, width, "row", bias=bias)

    def forward(self, modality: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """[vectors, width] of a picture [3, height, width]."""
        seen_TD = self.tower(inputs["pixels"][None]).view(-1, self.inputs)
        return self.down(self.up.activated(seen_TD, "gelu"))


def describe(c: Config) -> Decoder:
    """The tree of a LLaVA: the language model's, with an encoder."""
    decoder = languages.describe(c.text).tree
    if c.tower == "clip_vision_model":
        tower: Block = clip.describe(c.vision, features=c.features, keep_class=c.keeps_class)
    elif c.tower == "siglip_vision_model":
        tower = siglip.describe(c.vision, features=c.features)
    else:
        tower = pixtral.describe(c.vision, features=c.features)
    inputs = c.vision.width * len(c.features)
    decoder.encoder = LlavaEncoder(tower, inputs, decoder.embed.width, bias=c.bias)
    return decoder


def NAMES(c: Config) -> Names:
    """Of files as published and as transformers saves them, in which all but the head lies one level deeper."""
    text = languages.describe(c.text).names
    projector = Names(
        *((f"model.multi_modal_projector.linear_{i}", f"encoder.{to}") for i, to in ((1, "up"), (2, "down")))
    )
    tower: Names = _TOWERS[c.tower].NAMES
    seen = (tower.under("model.vision_tower.", "encoder.tower.") + projector).optional("model.")
    return seen + text.under("language_model.", "") + text.behind("model.", "model.language_model.")
