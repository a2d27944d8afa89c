"""GPT-2 (Radford et al. 2019): learned positions, biases everywhere, and matrices that are stored turned round."""

from dataclasses import dataclass
from typing import Self

from bestiary.blocks import MLP, Activation, Attention, Decoder, Embedding, Head, Layer, LayerNorm, Layers
from bestiary.checkpoint import ConfigFile, Names, Split, Transpose

__all__ = ["NAMES", "Config", "describe"]

#: The activations by the names that configurations give them.
_ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}


@dataclass(frozen=True)
class Config:
    """What config.json says of a GPT-2."""

    vocab_size: int
    width: int
    inner: int
    layers: int
    heads: int
    positions: int
    eps: float
    act: Activation
    scales: bool
    scales_by_layer: bool
    tied: bool

    @classmethod
    def read(cls, file: ConfigFile) -> Self:
        """Raises ConfigUnsupported for what no published GPT-2 has."""
        file.expect("add_cross_attention", False, default=False)
        width, heads = file.size(("n_embd", "hidden_size")), file.size(("n_head", "num_attention_heads"))
        file.must(width % heads == 0, "n_head", f"is {heads}; it must divide n_embd, {width}")
        return cls(
            vocab_size=file.size("vocab_size"),
            width=width,
            inner=file.size("n_inner", 4 * width),
            layers=file.size(("n_layer", "num_hidden_layers")),
            heads=heads,
            positions=file.size(("n_positions", "max_position_embeddings"), 1024),
            eps=file.get("layer_norm_epsilon", float, 1e-5),
            act=_ACTIVATIONS[file.expect("activation_function", *_ACTIVATIONS, default="gelu_new")],
            scales=file.get("scale_attn_weights", bool, True),
            scales_by_layer=file.get("scale_attn_by_inverse_layer_idx", bool, False),
            tied=file.get("tie_word_embeddings", bool, True),
        )


def describe(c: Config) -> Decoder:
    """The tree of a GPT-2."""
    head_dim = c.width // c.heads

    def layer(i: int) -> Layer:
        scale = (head_dim**-0.5 if c.scales else 1.0) / (i + 1 if c.scales_by_layer else 1)
        return Layer(
            mix_norm=LayerNorm(c.width, c.eps),
            mixer=Attention(
                c.width,
                heads=c.heads,
                kv_heads=c.heads,
                head_dim=head_dim,
                rope=None,
                bias=True,
                out_bias=True,
                scale=scale,
            ),
            ffn_norm=LayerNorm(c.width, c.eps),
            ffn=MLP(c.width, c.inner, act=c.act),
        )

    return Decoder(
        embed=Embedding(c.vocab_size, c.width),
        positions=Embedding(c.positions, c.width),
        layers=Layers(c.layers, layer),
        norm=LayerNorm(c.width, c.eps),
        head=Head(c.vocab_size, c.width, tied=c.tied),
        context=c.positions,
    )


NAMES = Names(
    ("transformer.wte", "embed"),
    ("transformer.wpe", "positions"),
    ("transformer.h.*.ln_1", "layers.*.mix_norm"),
    ("transformer.h.*.attn.c_attn", "layers.*.mixer.qkv", Transpose(), Split("q", "k", "v")),
    ("transformer.h.*.attn.c_proj", "layers.*.mixer.out", Transpose()),
    ("transformer.h.*.attn.bias", None),  # the causal mask
    ("transformer.h.*.attn.masked_bias", None),
    ("transformer.h.*.ln_2", "layers.*.ffn_norm"),
    ("transformer.h.*.mlp.c_fc", "layers.*.ffn.up", Transpose()),
    ("transformer.h.*.mlp.c_proj", "layers.*.ffn.down", Transpose()),
    ("transformer.ln_f", "norm"),
    ("lm_head", "head"),
).optional("transformer.")
