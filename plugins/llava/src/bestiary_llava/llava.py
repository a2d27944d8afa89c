"""LLaVA (Liu et al. 2023, arXiv 2310.03744): pictures, made vectors by somebody's tower, among somebody's tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

import bestiary_kernels as kernels
from bestiary.blocks import Decoder, Encoder, Linear
from bestiary.blocks.leaf import Block
from bestiary.checkpoint import ConfigFile, Names
from bestiary.model import language_model
from bestiary_towers import clip, pixtral, siglip

__all__ = ["NAMES", "Config", "LlavaEncoder", "describe"]

#: What an inner configuration leaves out is as in its class in transformers.
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "intermediate_size": 14336, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {**_LLAMA, "vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768},
}
_LANGUAGES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
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
        text = file.section("text_config")
        kind = text.expect("model_type", *_LANGUAGES)
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
        return cls(
            text=text.filled(_DEFAULTS[kind]),
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
        y_TD: Tensor = self.down(kernels.activation(self.up(seen_TD), "gelu"))
        return y_TD


def describe(c: Config) -> Decoder:
    """The tree of a LLaVA: the language model's, with an encoder."""
    decoder = language_model(c.text, _LANGUAGES).tree
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
    text = language_model(c.text, _LANGUAGES).names
    projector = Names(
        *((f"model.multi_modal_projector.linear_{i}", f"encoder.{to}") for i, to in ((1, "up"), (2, "down")))
    )
    tower: Names = _TOWERS[c.tower].NAMES
    seen = (tower.under("model.vision_tower.", "encoder.tower.") + projector).optional("model.")
    return seen + text.under("language_model.", "") + text.behind("model.", "model.language_model.")
