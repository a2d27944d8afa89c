"""DeepSeek MoE: Llama's attention over many small experts, with two that every token goes through."""

from dataclasses import dataclass
from typing import Self

from bestiary.blocks import Attention, Decoder, Embedding, Head, Layer, Layers, RMSNorm, Rope, Routing
from bestiary.checkpoint import ConfigFile, Names
from bestiary_deepseek import experts
from bestiary_deepseek.experts import FeedForward

__all__ = ["NAMES", "Config", "describe"]


@dataclass(frozen=True)
class Config:
    """What config.json says of a DeepSeek MoE."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    rms_norm_eps: float
    rope: Rope
    bias: bool
    tied: bool
    ffn: FeedForward

    @classmethod
    def read(cls, file: ConfigFile) -> Self:
        """Raises ConfigUnsupported for what no published model of this generation has."""
        file.expect("hidden_act", "silu", default="silu")
        file.expect("scoring_func", "softmax", default="softmax")
        width, heads = file.size("hidden_size"), file.size("num_attention_heads")
        kv_heads = file.size("num_key_value_heads", heads)
        file.must(heads % kv_heads == 0, "num_key_value_heads", f"is {kv_heads}; it must divide the {heads} heads")
        file.must(width % heads == 0, "hidden_size", f"is {width}; {heads} heads must divide it")
        rope = Rope.read(file, width // heads)
        routing = Routing(file.size("num_experts_per_tok"), renormalise=file.get("norm_topk_prob", bool, False))
        return cls(
            vocab_size=file.size("vocab_size"),
            hidden_size=width,
            layers=file.size("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            context=rope.reach(file.size("max_position_embeddings", 2048)),
            rms_norm_eps=file.get("rms_norm_eps", float, 1e-6),
            rope=rope,
            bias=file.get("attention_bias", bool, False),
            tied=file.get("tie_word_embeddings", bool, False),
            ffn=FeedForward.read(file, routing),
        )


def describe(c: Config) -> Decoder:
    """The tree of a DeepSeek MoE."""

    def layer(i: int) -> Layer:
        return Layer(
            mix_norm=RMSNorm(c.hidden_size, c.rms_norm_eps),
            mixer=Attention(
                c.hidden_size,
                heads=c.heads,
                kv_heads=c.kv_heads,
                head_dim=c.hidden_size // c.heads,
                rope=c.rope,
                bias=c.bias,
                out_bias=c.bias,
            ),
            ffn_norm=RMSNorm(c.hidden_size, c.rms_norm_eps),
            ffn=c.ffn.layer(i),
        )

    return Decoder(
        embed=Embedding(c.vocab_size, c.hidden_size),
        layers=Layers(c.layers, layer),
        norm=RMSNorm(c.hidden_size, c.rms_norm_eps),
        head=Head(c.vocab_size, c.hidden_size, tied=c.tied),
        context=c.context,
    )


NAMES = experts.NAMES + Names(
    ("model.embed_tokens", "embed"),
    ("model.layers.*.input_layernorm", "layers.*.mix_norm"),
    ("model.layers.*.self_attn.q_proj", "layers.*.mixer.qkv[q]"),
    ("model.layers.*.self_attn.k_proj", "layers.*.mixer.qkv[k]"),
    ("model.layers.*.self_attn.v_proj", "layers.*.mixer.qkv[v]"),
    ("model.layers.*.self_attn.o_proj", "layers.*.mixer.out"),
    ("model.layers.*.self_attn.rotary_emb", None),
    ("model.layers.*.post_attention_layernorm", "layers.*.ffn_norm"),
    ("model.norm", "norm"),
    ("lm_head", "head"),
)
