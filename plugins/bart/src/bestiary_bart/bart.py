"""BART (Lewis et al. 2019, arXiv 1910.13461): a decoder that looks at what an encoder made of a text."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from bestiary.blocks import (
    MLP,
    Activation,
    Attention,
    CrossAttention,
    Decoder,
    Embedding,
    Encoder,
    EncoderAttention,
    Head,
    Items,
    LayerNorm,
    Layers,
    PostNormLayer,
)
from bestiary.checkpoint import ConfigFile, Names, Squeeze

__all__ = ["NAMES", "BartEncoder", "Config", "describe"]

_EPS = 1e-5
#: Rows of the tables of positions that no position uses.
_OFFSET = 2


@dataclass(frozen=True)
class Config:
    """What config.json says of a BART."""

    vocab_size: int
    width: int
    encoder_layers: int
    encoder_heads: int
    encoder_inner: int
    decoder_layers: int
    decoder_heads: int
    decoder_inner: int
    positions: int
    act: Activation
    embed_scale: float | None
    has_logits_bias: bool

    @classmethod
    def read(cls, file: ConfigFile) -> Self:
        """Raises ConfigUnsupported for what no published BART has."""
        file.expect("tie_word_embeddings", True, default=True)
        width = file.size("d_model")
        for side in ("encoder", "decoder"):
            heads = file.size(f"{side}_attention_heads")
            file.must(width % heads == 0, f"{side}_attention_heads", f"is {heads}; it must divide d_model, {width}")
        return cls(
            vocab_size=file.size("vocab_size"),
            width=width,
            encoder_layers=file.size("encoder_layers"),
            encoder_heads=file.size("encoder_attention_heads"),
            encoder_inner=file.size("encoder_ffn_dim"),
            decoder_layers=file.size("decoder_layers"),
            decoder_heads=file.size("decoder_attention_heads"),
            decoder_inner=file.size("decoder_ffn_dim"),
            positions=file.size("max_position_embeddings", 1024),
            act=file.expect("activation_function", "gelu", "relu", "silu", default="gelu"),
            embed_scale=math.sqrt(width) if file.get("scale_embedding", bool, False) else None,
            has_logits_bias="BartForConditionalGeneration" in file.architectures,
        )


class BartEncoder(Encoder):
    """Tokens that see each other both ways, to as many vectors."""

    def __init__(self, c: Config, embed: Embedding) -> None:
        super().__init__()
        self.embed, self.scale = embed, c.embed_scale or 1.0
        self.positions = Embedding(c.positions + _OFFSET, c.width, offset=_OFFSET)
        self.norm = LayerNorm(c.width, _EPS)
        self.layers = nn.ModuleList(
            PostNormLayer(
                mixer=EncoderAttention(c.width, heads=c.encoder_heads),
                mix_norm=LayerNorm(c.width, _EPS),
                ffn=MLP(c.width, c.encoder_inner, act=c.act),
                ffn_norm=LayerNorm(c.width, _EPS),
            )
            for _ in range(c.encoder_layers)
        )

    def forward(self, modality: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """[tokens, width]."""
        ids_T = inputs["token_ids"]
        x_TD: Tensor = self.embed(ids_T) * self.scale + self.positions(torch.arange(len(ids_T), device=ids_T.device))
        x_TD = self.norm(x_TD)[0]
        text = Items((len(ids_T),))
        for layer in self.layers:
            x_TD, _ = layer(x_TD, None, text)
        return x_TD


def describe(c: Config) -> Decoder:
    """The tree of a BART."""
    heads, head_dim = c.decoder_heads, c.width // c.decoder_heads

    def layer(i: int) -> PostNormLayer:
        return PostNormLayer(
            mixer=Attention(
                c.width, heads=heads, kv_heads=heads, head_dim=head_dim, rope=None, bias=True, out_bias=True
            ),
            mix_norm=LayerNorm(c.width, _EPS),
            cross=CrossAttention(c.width, heads=heads, kv_heads=heads, head_dim=head_dim, most=c.positions, bias=True),
            cross_norm=LayerNorm(c.width, _EPS),
            ffn=MLP(c.width, c.decoder_inner, act=c.act),
            ffn_norm=LayerNorm(c.width, _EPS),
        )

    embed = Embedding(c.vocab_size, c.width)
    return Decoder(
        embed=embed,
        embed_scale=c.embed_scale,
        positions=Embedding(c.positions + _OFFSET, c.width, offset=_OFFSET),
        embed_norm=LayerNorm(c.width, _EPS),
        encoder=BartEncoder(c, embed),
        layers=Layers(c.decoder_layers, layer),
        norm=None,
        head=Head(c.vocab_size, c.width, tied=True, bias=c.has_logits_bias),
        context=c.positions,
    )


def _side(source: str, path: str) -> Names:
    """The rows that encoder and decoder have in common."""
    layers, layer = f"model.{source}.layers.*", f"{path}layers.*"
    return Names(
        (f"model.{source}.embed_tokens", None),  # the shared table once more
        (f"model.{source}.embed_positions", f"{path}positions"),
        (f"model.{source}.layernorm_embedding", f"{path}norm" if path else "embed_norm"),
        *((f"{layers}.self_attn.{part}_proj", f"{layer}.mixer.qkv[{part}]") for part in "qkv"),
        (f"{layers}.self_attn.out_proj", f"{layer}.mixer.out"),
        (f"{layers}.self_attn_layer_norm", f"{layer}.mix_norm"),
        (f"{layers}.fc1", f"{layer}.ffn.up"),
        (f"{layers}.fc2", f"{layer}.ffn.down"),
        (f"{layers}.final_layer_norm", f"{layer}.ffn_norm"),
    )


NAMES = (
    _side("encoder", "encoder.")
    + _side("decoder", "")
    + Names(
        ("model.shared", "embed"),
        ("model.decoder.layers.*.encoder_attn.q_proj", "layers.*.cross.q"),
        ("model.decoder.layers.*.encoder_attn.k_proj", "layers.*.cross.kv[k]"),
        ("model.decoder.layers.*.encoder_attn.v_proj", "layers.*.cross.kv[v]"),
        ("model.decoder.layers.*.encoder_attn.out_proj", "layers.*.cross.out"),
        ("model.decoder.layers.*.encoder_attn_layer_norm", "layers.*.cross_norm"),
        ("final_logits_bias", "head:bias", Squeeze()),
        ("lm_head", "head"),
    )
).optional("model.")
