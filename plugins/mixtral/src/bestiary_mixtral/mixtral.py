"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): Mistral with eight experts in every layer, of which two are asked."""

from dataclasses import dataclass
from typing import Self

from bestiary.blocks import Attention, Decoder, Embedding, Head, Layer, Layers, MoE, RMSNorm, Rope, Routing
from bestiary.checkpoint import ConfigFile, Names, Split, Stacked

__all__ = ["NAMES", "Config", "describe"]


@dataclass(frozen=True)
class Config:
    """What config.json says of a Mixtral."""

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
    window: int | None
    experts: int
    top_k: int
    tied: bool

    @classmethod
    def read(cls, file: ConfigFile) -> Self:
        """Raises ConfigUnsupported for what no published Mixtral has."""
        file.expect("hidden_act", "silu", default="silu")
        width, heads = file.size("hidden_size"), file.size("num_attention_heads")
        kv_heads = file.size("num_key_value_heads", 8)
        file.must(heads % kv_heads == 0, "num_key_value_heads", f"is {kv_heads}; it must divide the {heads} heads")
        own_size = "head_dim" in file
        file.must(own_size or width % heads == 0, "hidden_size", f"is {width}; {heads} heads must divide it")
        head_dim = file.size("head_dim", max(width // heads, 1))
        rope = Rope.read(file.filled({"rope_theta": 1000000.0}), head_dim)
        window = file.get("sliding_window", int)
        file.must(window is None or window > 0, "sliding_window", f"is {window}; it must be at least 1")
        experts, top_k = file.size("num_local_experts", 8), file.size("num_experts_per_tok", 2)
        file.must(top_k <= experts, "num_experts_per_tok", f"is {top_k}, of {experts} experts")
        return cls(
            vocab_size=file.size("vocab_size"),
            hidden_size=width,
            intermediate_size=file.size("intermediate_size"),
            layers=file.size("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            context=rope.reach(file.size("max_position_embeddings", 131072)),
            rms_norm_eps=file.get("rms_norm_eps", float, 1e-5),
            rope=rope,
            window=window,
            experts=experts,
            top_k=top_k,
            tied=file.get("tie_word_embeddings", bool, False),
        )


def describe(c: Config) -> Decoder:
    """The tree of a Mixtral."""

    def layer(i: int) -> Layer:
        return Layer(
            mix_norm=RMSNorm(c.hidden_size, c.rms_norm_eps),
            mixer=Attention(
                c.hidden_size,
                heads=c.heads,
                kv_heads=c.kv_heads,
                head_dim=c.head_dim,
                rope=c.rope,
                window=c.window,
            ),
            ffn_norm=RMSNorm(c.hidden_size, c.rms_norm_eps),
            ffn=MoE(c.hidden_size, c.intermediate_size, c.experts, Routing(c.top_k, renormalise=True)),
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
    ("model.layers.*.block_sparse_moe.gate", "layers.*.ffn.router"),
    ("model.layers.*.block_sparse_moe.experts.*.w1", "layers.*.ffn.gate_up[gate]"),
    ("model.layers.*.block_sparse_moe.experts.*.w3", "layers.*.ffn.gate_up[up]"),
    ("model.layers.*.block_sparse_moe.experts.*.w2", "layers.*.ffn.down"),
    ("model.layers.*.mlp.gate", "layers.*.ffn.router"),
    ("model.layers.*.mlp.experts.gate_up_proj", "layers.*.ffn.gate_up:weight", Stacked(), Split("gate", "up")),
    ("model.layers.*.mlp.experts.down_proj", "layers.*.ffn.down:weight", Stacked()),
    ("model.norm", "norm"),
    ("lm_head", "head"),
)
