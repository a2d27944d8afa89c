"""Llama 1 to 3.2 and everything cast in its mould: a pre-norm decoder with grouped-query attention and a gated MLP."""

from dataclasses import dataclass
from typing import Self

from bestiary.blocks import Attention, Decoder, Embedding, GatedMLP, Head, Layer, Layers, RMSNorm, Rope
from bestiary.checkpoint import ConfigFile, Names

__all__ = ["NAMES", "Config", "describe"]


@dataclass(frozen=True)
class Config:
    """What config.json says of a Llama."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    rms_norm_eps: float
    rope: Rope
    attention_bias: bool
    mlp_bias: bool
    tied: bool

    @classmethod
    def read(cls, file: ConfigFile) -> Self:
        """Raises ConfigUnsupported for what no published Llama has."""
        file.expect("hidden_act", "silu", default="silu")
        file.expect("pretraining_tp", 1, 2, 4, default=1)  # it orders sums in training; the result is the same
        width, heads = file.size("hidden_size"), file.size("num_attention_heads")
        kv_heads = file.size("num_key_value_heads", heads)
        file.must(heads % kv_heads == 0, "num_key_value_heads", f"is {kv_heads}; it must divide the {heads} heads")
        own_size = "head_dim" in file
        file.must(own_size or width % heads == 0, "hidden_size", f"is {width}; {heads} heads must divide it")
        head_dim = file.size("head_dim", max(width // heads, 1))
        rope = Rope.read(file, head_dim)
        return cls(
            vocab_size=file.size("vocab_size"),
            hidden_size=width,
            intermediate_size=file.size("intermediate_size"),
            layers=file.size("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            context=rope.reach(file.size("max_position_embeddings", 2048)),
            rms_norm_eps=file.get("rms_norm_eps", float, 1e-6),
            rope=rope,
            attention_bias=file.get("attention_bias", bool, False),
            mlp_bias=file.get("mlp_bias", bool, False),
            tied=file.get("tie_word_embeddings", bool, False),
        )


def describe(c: Config) -> Decoder:
    """The tree of a Llama."""

    def layer(i: int) -> Layer:
        return Layer(
            mix_norm=RMSNorm(c.hidden_size, c.rms_norm_eps),
            mixer=Attention(
                c.hidden_size,
                heads=c.heads,
                kv_heads=c.kv_heads,
                head_dim=c.head_dim,
                rope=c.rope,
                bias=c.attention_bias,
                out_bias=c.attention_bias,
            ),
            ffn_norm=RMSNorm(c.hidden_size, c.rms_norm_eps),
            ffn=GatedMLP(c.hidden_size, c.intermediate_size, bias=c.mlp_bias),
        )

    return Decoder(
        embed=Embedding(c.vocab_size, c.hidden_size),
        layers=Layers(c.layers, layer),
        norm=RMSNorm(c.hidden_size, c.rms_norm_eps),
        head=Head(c.vocab_size, c.hidden_size, tied=c.tied),
        context=c.context,
    )


NAMES = Names(
    ("model.embed_tokens", "embed"),
    ("model.layers.*.input_layernorm", "layers.*.mix_norm"),
    ("model.layers.*.self_attn.q_proj", "layers.*.mixer.qkv[q]"),
    ("model.layers.*.self_attn.k_proj", "layers.*.mixer.qkv[k]"),
    ("model.layers.*.self_attn.v_proj", "layers.*.mixer.qkv[v]"),
    ("model.layers.*.self_attn.o_proj", "layers.*.mixer.out"),
    ("model.layers.*.self_attn.rotary_emb", None),
    ("model.layers.*.post_attention_layernorm", "layers.*.ffn_norm"),
    ("model.layers.*.mlp.gate_proj", "layers.*.ffn.gate_up[gate]"),
    ("model.layers.*.mlp.up_proj", "layers.*.ffn.gate_up[up]"),
    ("model.layers.*.mlp.down_proj", "layers.*.ffn.down"),
    ("model.norm", "norm"),
    ("lm_head", "head"),
)
