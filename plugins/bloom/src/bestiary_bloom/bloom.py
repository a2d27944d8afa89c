"""BLOOM (BigScience 2022, arXiv 2211.05100): no positions but biases that fall with the distance (ALiBi)."""

from dataclasses import dataclass
from typing import Self

from bestiary.blocks import MLP, Alibi, Attention, Decoder, Embedding, Head, Layer, LayerNorm, Layers
from bestiary.checkpoint import ConfigFile, Interleaved, Names

__all__ = ["NAMES", "Config", "describe"]


@dataclass(frozen=True)
class Config:
    """What config.json says of a BLOOM."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    context: int
    eps: float
    tied: bool

    @classmethod
    def read(cls, file: ConfigFile) -> Self:
        """Raises ConfigUnsupported for what no published BLOOM has."""
        file.expect("apply_residual_connection_post_layernorm", False, default=False)
        width, heads = file.size(("hidden_size", "n_embed")), file.size(("n_head", "num_attention_heads"))
        file.must(width % heads == 0, "n_head", f"is {heads}; it must divide the width, {width}")
        return cls(
            vocab_size=file.size("vocab_size"),
            width=width,
            layers=file.size(("n_layer", "num_hidden_layers")),
            heads=heads,
            context=file.size("seq_length", 2048),
            eps=file.get("layer_norm_epsilon", float, 1e-5),
            tied=file.get("tie_word_embeddings", bool, True),
        )


def describe(c: Config) -> Decoder:
    """The tree of a BLOOM."""

    def layer(i: int) -> Layer:
        return Layer(
            mix_norm=LayerNorm(c.width, c.eps),
            mixer=Attention(
                c.width,
                heads=c.heads,
                kv_heads=c.heads,
                head_dim=c.width // c.heads,
                rope=None,
                alibi=Alibi(c.heads),
                bias=True,
                out_bias=True,
            ),
            ffn_norm=LayerNorm(c.width, c.eps),
            ffn=MLP(c.width, 4 * c.width, act="gelu_tanh"),
        )

    return Decoder(
        embed=Embedding(c.vocab_size, c.width),
        embed_norm=LayerNorm(c.width, c.eps),
        layers=Layers(c.layers, layer),
        norm=LayerNorm(c.width, c.eps),
        head=Head(c.vocab_size, c.width, tied=c.tied),
        context=c.context,
    )


NAMES = Names(
    ("transformer.word_embeddings", "embed"),
    ("transformer.word_embeddings_layernorm", "embed_norm"),
    ("transformer.h.*.input_layernorm", "layers.*.mix_norm"),
    ("transformer.h.*.self_attention.query_key_value", "layers.*.mixer.qkv", Interleaved("q", "k", "v")),
    ("transformer.h.*.self_attention.dense", "layers.*.mixer.out"),
    ("transformer.h.*.post_attention_layernorm", "layers.*.ffn_norm"),
    ("transformer.h.*.mlp.dense_h_to_4h", "layers.*.ffn.up"),
    ("transformer.h.*.mlp.dense_4h_to_h", "layers.*.ffn.down"),
    ("transformer.ln_f", "norm"),
    ("lm_head", "head"),
).optional("transformer.")
