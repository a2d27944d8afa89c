"""Llama 3.2 Vision (Llama Team 2024, arXiv 2407.21783): a Llama, some of whose layers look at a picture."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bestiary.batch import Batch
from bestiary.blocks import CrossAttention, Decoder, Embedding, Encoder, GatedMLP, Head, Learned, Linear, RMSNorm
from bestiary.blocks.leaf import Block
from bestiary.checkpoint import ConfigFile, Names
from bestiary.model import language_model
from bestiary_mllama import vision

__all__ = ["NAMES", "Config", "CrossLayer", "MllamaEncoder", "describe"]

_LANGUAGES = {"mllama_text_model": "LlamaForCausalLM"}
#: Tokens that stand in prompts alone, a picture's among them.
_UNWRITTEN = 8
#: Fine-tuned models' configurations hold what differs from the class in transformers; this is how that begins.
_LEFT_OUT = {
    "model_type": "mllama_text_model",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}


@dataclass(frozen=True)
class Config:
    """What config.json says of a Llama 3.2 Vision."""

    text: ConfigFile
    vision: vision.Config
    cross_layers: tuple[int, ...]
    vocab_size: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    eps: float
    image_token: int

    @classmethod
    def read(cls, file: ConfigFile) -> Self:
        """Raises ConfigUnsupported for what no published Llama 3.2 Vision has."""
        text = file.section("text_config").filled(_LEFT_OUT)
        layers = text.size("num_hidden_layers")
        cross = text.get("cross_attention_layers", tuple[int, ...], (3, 8, 13, 18, 23, 28, 33, 38))
        text.must(set(cross) < set(range(layers)), "cross_attention_layers", f"is {list(cross)} of {layers} layers")
        heads = text.size("num_attention_heads")
        return cls(
            text=text,
            vision=vision.Config.read(file.section("vision_config")),
            cross_layers=cross,
            vocab_size=text.size("vocab_size"),
            width=text.size("hidden_size"),
            inner=text.size("intermediate_size"),
            heads=heads,
            kv_heads=text.size("num_key_value_heads", heads),
            eps=text.get("rms_norm_eps", float, 1e-5),
            image_token=file.get(("image_token_index", "image_token_id"), int, 128256),
        )


class CrossLayer(Block):
    """Looks at the picture, then thinks; gates let through how much. Without a picture nothing happens here."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.mix_norm, self.ffn_norm = RMSNorm(c.width, c.eps), RMSNorm(c.width, c.eps)
        self.cross = CrossAttention(
            c.width,
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.width // c.heads,
            most=c.vision.tiles * c.vision.tokens,
            qk_eps=c.eps,
        )
        self.ffn = GatedMLP(c.width, c.inner)
        self.mix_gate, self.ffn_gate = Learned(1), Learned(1)

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None, batch: Batch) -> tuple[Tensor, None]:
        """The stream, whole."""
        x_TD = x_TD if residual_TD is None else x_TD + residual_TD
        crossing = batch.crossings[self.cross.group]
        if crossing.nobody:
            return x_TD, None
        y_TD = x_TD + self.mix_gate.weight.tanh() * self.cross(self.mix_norm(x_TD)[0], batch)
        thought_TD = self.ffn(self.ffn_norm(y_TD)[0], batch)
        if crossing.heeds is not None:  # a token before the picture looks at it all the same, and thinks nothing of it
            thought_TD = thought_TD * crossing.heeds[:, None]
        y_TD = y_TD + self.ffn_gate.weight.tanh() * thought_TD
        return (y_TD if crossing.looking is None else torch.where(crossing.looking[:, None], y_TD, x_TD)), None


class MllamaEncoder(Encoder):
    """The tower's vectors in the width of the language model."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.tower = vision.Tower(c.vision)
        self.projector = Linear(c.vision.outputs, c.width, "whole", bias=True)

    def forward(self, modality: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """[tiles x tokens, width] of a picture, the tiles that it fills first."""
        y_TD: Tensor = self.projector(self.tower(inputs["pixels"], inputs["canvas"]))
        return y_TD


def describe(c: Config) -> Decoder:
    """The tree of a Llama 3.2 Vision: a Llama's, with layers that look, and an encoder."""
    decoder = language_model(c.text, _LANGUAGES).tree
    for number in c.cross_layers:
        decoder.layers[str(number)] = CrossLayer(c)
    decoder.embed = Embedding(c.vocab_size + _UNWRITTEN, c.width)
    decoder.head = Head(c.vocab_size, c.width, unwritten=_UNWRITTEN)
    decoder.encoder = MllamaEncoder(c)
    return decoder


def NAMES(c: Config) -> Names:
    """Of files as published and as transformers 4.52 to 4.57 saved them, with all but the head one level deeper."""
    layer, attention = "model.layers.*", "model.layers.*.cross_attn"
    text = language_model(c.text, _LANGUAGES).names + Names(
        (f"{attention}.q_proj", "layers.*.cross.q"),
        (f"{attention}.k_proj", "layers.*.cross.kv[k]"),
        (f"{attention}.v_proj", "layers.*.cross.kv[v]"),
        (f"{attention}.o_proj", "layers.*.cross.out"),
        (f"{attention}.q_norm", "layers.*.cross.q_norm"),
        (f"{attention}.k_norm", "layers.*.cross.k_norm"),
        (f"{layer}.cross_attn_attn_gate", "layers.*.mix_gate"),
        (f"{layer}.cross_attn_mlp_gate", "layers.*.ffn_gate"),
    )
    projector = Names(("model.multi_modal_projector", "encoder.projector"))
    seen = (vision.NAMES.under("model.vision_model.", "encoder.tower.") + projector).optional("model.")
    return seen + text.under("language_model.", "") + text.behind("model.", "model.language_model.")
