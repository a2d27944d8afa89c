"""Jamba (Lieber et al. 2024, arXiv 2403.19887): a little attention among state spaces, experts in every other layer."""

import math
from dataclasses import dataclass
from typing import Self

from bestiary.blocks import (
    Attention,
    Decoder,
    Embedding,
    GatedMLP,
    Head,
    Layer,
    Layers,
    Mamba,
    MoE,
    RMSNorm,
    Routing,
)
from bestiary.checkpoint import ConfigFile, Names, Split, Stacked

__all__ = ["NAMES", "Config", "describe"]


@dataclass(frozen=True)
class _Every:
    """Layer i is one of these where i mod `period` is `offset`."""

    period: int
    offset: int

    @classmethod
    def read(cls, file: ConfigFile, kind: str, period: int, offset: int) -> Self:
        """`period` and `offset` are what they are where the file does not say."""
        return cls(file.size(f"{kind}_layer_period", period), file.get(f"{kind}_layer_offset", int, offset))

    def has(self, i: int) -> bool:
        """Layer i is one."""
        return i % self.period == self.offset


@dataclass(frozen=True)
class Config:
    """What config.json says of a Jamba."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    eps: float
    attention: _Every
    sparse: _Every
    experts: int
    top_k: int
    inner: int
    state: int
    taps: int
    step_rank: int
    proj_bias: bool
    conv_bias: bool
    tied: bool

    @classmethod
    def read(cls, file: ConfigFile) -> Self:
        """Raises ConfigUnsupported for what no published Jamba has."""
        file.expect("hidden_act", "silu", default="silu")
        width, heads = file.size("hidden_size"), file.size("num_attention_heads")
        kv_heads = file.size("num_key_value_heads", heads)
        file.must(heads % kv_heads == 0, "num_key_value_heads", f"is {kv_heads}; it must divide the {heads} heads")
        file.must(width % heads == 0, "hidden_size", f"is {width}; {heads} heads must divide it")
        auto = file.values.get("mamba_dt_rank", "auto") == "auto"
        return cls(
            vocab_size=file.size("vocab_size"),
            hidden_size=width,
            intermediate_size=file.size("intermediate_size"),
            layers=file.size("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            context=file.size("max_position_embeddings", 262144),
            eps=file.get("rms_norm_eps", float, 1e-6),
            attention=_Every.read(file, "attn", 8, 4),
            sparse=_Every.read(file, "expert", 2, 1),
            experts=file.size("num_experts", 16),
            top_k=file.size("num_experts_per_tok", 2),
            inner=file.size("mamba_expand", 2) * width,
            state=file.size("mamba_d_state", 16),
            taps=file.size("mamba_d_conv", 4),
            step_rank=math.ceil(width / 16) if auto else file.size("mamba_dt_rank"),
            proj_bias=file.get("mamba_proj_bias", bool, False),
            conv_bias=file.get("mamba_conv_bias", bool, True),
            tied=file.get("tie_word_embeddings", bool, False),
        )


def describe(c: Config) -> Decoder:
    """The tree of a Jamba."""

    def mixer(i: int) -> Attention | Mamba:
        if c.attention.has(i):
            head_dim = c.hidden_size // c.heads
            return Attention(c.hidden_size, heads=c.heads, kv_heads=c.kv_heads, head_dim=head_dim, rope=None)
        return Mamba(
            c.hidden_size,
            inner=c.inner,
            state=c.state,
            taps=c.taps,
            step_rank=c.step_rank,
            bias=c.proj_bias,
            conv_bias=c.conv_bias,
            norm_eps=c.eps,
        )

    def ffn(i: int) -> GatedMLP | MoE:
        if c.experts > 1 and c.sparse.has(i):
            return MoE(c.hidden_size, c.intermediate_size, c.experts, Routing(c.top_k, renormalise=False))
        return GatedMLP(c.hidden_size, c.intermediate_size)

    def layer(i: int) -> Layer:
        return Layer(
            mix_norm=RMSNorm(c.hidden_size, c.eps),
            mixer=mixer(i),
            ffn_norm=RMSNorm(c.hidden_size, c.eps),
            ffn=ffn(i),
        )

    return Decoder(
        embed=Embedding(c.vocab_size, c.hidden_size),
        layers=Layers(c.layers, layer),
        norm=RMSNorm(c.hidden_size, c.eps),
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
    ("model.layers.*.mamba.in_proj", "layers.*.mixer.into", Split("x", "z")),
    ("model.layers.*.mamba.conv1d", "layers.*.mixer.conv"),
    ("model.layers.*.mamba.x_proj", "layers.*.mixer.select"),
    ("model.layers.*.mamba.dt_layernorm", "layers.*.mixer.step_norm"),
    ("model.layers.*.mamba.b_layernorm", "layers.*.mixer.input_norm"),
    ("model.layers.*.mamba.c_layernorm", "layers.*.mixer.output_norm"),
    ("model.layers.*.mamba.dt_proj", "layers.*.mixer.step"),
    ("model.layers.*.mamba.A_log", "layers.*.mixer.decay:weight"),
    ("model.layers.*.mamba.D", "layers.*.mixer.skip:weight"),
    ("model.layers.*.mamba.out_proj", "layers.*.mixer.out"),
    ("model.layers.*.pre_ff_layernorm", "layers.*.ffn_norm"),
    ("model.layers.*.feed_forward.gate_proj", "layers.*.ffn.gate_up[gate]"),
    ("model.layers.*.feed_forward.up_proj", "layers.*.ffn.gate_up[up]"),
    ("model.layers.*.feed_forward.down_proj", "layers.*.ffn.down"),
    ("model.layers.*.feed_forward.router", "layers.*.ffn.router"),
    ("model.layers.*.feed_forward.experts.*.gate_proj", "layers.*.ffn.gate_up[gate]"),
    ("model.layers.*.feed_forward.experts.*.up_proj", "layers.*.ffn.gate_up[up]"),
    ("model.layers.*.feed_forward.experts.*.down_proj", "layers.*.ffn.down"),
    ("model.layers.*.feed_forward.experts.gate_up_proj", "layers.*.ffn.gate_up:weight", Stacked(), Split("gate", "up")),
    ("model.layers.*.feed_forward.experts.down_proj", "layers.*.ffn.down:weight", Stacked()),
    ("model.final_layernorm", "norm"),
    ("lm_head", "head"),
)
