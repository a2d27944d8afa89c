"""Gemma (Gemma Team 2024, arXiv 2403.08295): Llama's blocks with wide heads, gains around zero, scaled embeddings."""

from dataclasses import dataclass
from typing import Self

from bestiary.blocks import Attention, Decoder, Embedding, GatedMLP, Head, Layer, Layers, RMSNorm, Rope
from bestiary.checkpoint import ConfigFile, Names

__all__ = ["NAMES", "Config", "describe"]


@dataclass(frozen=True)
class Config:
    """What config.json says of a Gemma."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    eps: float
    rope: Rope
    bias: bool
    tied: bool

    @classmethod
    def read(cls, file: ConfigFile) -> Self:
        """Raises ConfigUnsupported for what no published Gemma has."""
        # The first files say "gelu" and mean its approximation, which the later key names.
        file.expect(("hidden_activation", "hidden_act"), "gelu_pytorch_tanh", "gelu", default="gelu_pytorch_tanh")
        heads = file.size("num_attention_heads")
        kv_heads = file.size("num_key_value_heads", heads)
        file.must(heads % kv_heads == 0, "num_key_value_heads", f"is {kv_heads}; it must divide the {heads} heads")
        head_dim = file.size("head_dim", 256)
        rope = Rope.read(file, head_dim)
        return cls(
            vocab_size=file.size("vocab_size"),
            hidden_size=file.size("hidden_size"),
            intermediate_size=file.size("intermediate_size"),
            layers=file.size("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            context=rope.reach(file.size("max_position_embeddings", 8192)),
            eps=file.get("rms_norm_eps", float, 1e-6),
            rope=rope,
            bias=file.get("attention_bias", bool, False),
            tied=file.get("tie_word_embeddings", bool, True),
        )

    def norm(self) -> RMSNorm:
        """A norm whose gains are stored as their distance from one."""
        return RMSNorm(self.hidden_size, self.eps, offset=1.0)


def describe(c: Config) -> Decoder:
    """The tree of a Gemma."""

    def layer(i: int) -> Layer:
        return Layer(
            mix_norm=c.norm(),
            mixer=Attention(
                c.hidden_size,
                heads=c.heads,
                kv_heads=c.kv_heads,
                head_dim=c.head_dim,
                rope=c.rope,
                bias=c.bias,
                out_bias=c.bias,
            ),
            ffn_norm=c.norm(),
            ffn=GatedMLP(c.hidden_size, c.intermediate_size, act="gelu_tanh"),
        )

    return Decoder(
        embed=Embedding(c.vocab_size, c.hidden_size),
        embed_scale=c.hidden_size**0.5,
        layers=Layers(c.layers, layer),
        norm=c.norm(),
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
