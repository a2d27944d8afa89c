"""DeepSeek-V2 (DeepSeek-AI 2024, arXiv 2405.04434): latent attention over experts that are chosen by groups."""

import math
from dataclasses import dataclass
from typing import Self

from bestiary.blocks import Decoder, Embedding, Head, LatentAttention, Layer, Layers, RMSNorm, Rope, Routing
from bestiary.checkpoint import ConfigFile, Interleaved, Names
from bestiary_deepseek import experts
from bestiary_deepseek.experts import FeedForward

__all__ = ["NAMES", "Config", "describe"]

#: Of the norms within attention, whatever the configuration says of the others.
_LATENT_EPS = 1e-6


@dataclass(frozen=True)
class Config:
    """What config.json says of a DeepSeek-V2."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    q_rank: int | None
    kv_rank: int
    plain_dim: int
    v_dim: int
    context: int
    rms_norm_eps: float
    rope: Rope
    scale: float
    bias: bool
    tied: bool
    ffn: FeedForward

    @classmethod
    def read(cls, file: ConfigFile) -> Self:
        """Raises ConfigUnsupported for what no published model of this generation has."""
        file.expect("hidden_act", "silu", default="silu")
        file.expect("scoring_func", "softmax", default="softmax")
        file.expect("norm_topk_prob", False, default=False)
        rope = Rope.read(file, file.size("qk_rope_head_dim"), interleaved=True)
        plain_dim = file.size("qk_nope_head_dim")
        return cls(
            vocab_size=file.size("vocab_size"),
            hidden_size=file.size("hidden_size"),
            layers=file.size("num_hidden_layers"),
            heads=file.size("num_attention_heads"),
            q_rank=file.get("q_lora_rank", int),
            kv_rank=file.size("kv_lora_rank"),
            plain_dim=plain_dim,
            v_dim=file.size("v_head_dim"),
            context=rope.reach(file.size("max_position_embeddings", 2048)),
            rms_norm_eps=file.get("rms_norm_eps", float, 1e-6),
            rope=rope,
            scale=(plain_dim + rope.dim) ** -0.5 * _temperature(file) ** 2,
            bias=file.get("attention_bias", bool, False),
            tied=file.get("tie_word_embeddings", bool, False),
            ffn=FeedForward.read(file, _routing(file)),
        )


def _temperature(file: ConfigFile) -> float:
    """What stretched positions do to queries and keys each: 0.1 m ln(factor) + 1."""
    rope = file.rope()
    if rope.type == "default" or not rope.mscale_all_dim or rope.need("factor") <= 1:
        return 1.0
    return 0.1 * rope.mscale_all_dim * math.log(rope.need("factor")) + 1.0


def _routing(file: ConfigFile) -> Routing:
    method = file.expect("topk_method", "greedy", "group_limited_greedy", default="greedy")
    by_groups = method == "group_limited_greedy"
    groups, experts_ = file.size("n_group", 1), file.size("n_routed_experts")
    file.must(experts_ % groups == 0, "n_group", f"is {groups}; it must divide the {experts_} experts")
    return Routing(
        file.size("num_experts_per_tok"),
        renormalise=False,
        scale=file.get("routed_scaling_factor", float, 1.0),
        groups=groups if by_groups else 1,
        top_groups=file.size("topk_group", 1) if by_groups else 1,
    )


def describe(c: Config) -> Decoder:
    """The tree of a DeepSeek-V2."""

    def layer(i: int) -> Layer:
        return Layer(
            mix_norm=RMSNorm(c.hidden_size, c.rms_norm_eps),
            mixer=LatentAttention(
                c.hidden_size,
                heads=c.heads,
                q_rank=c.q_rank,
                kv_rank=c.kv_rank,
                plain_dim=c.plain_dim,
                rope=c.rope,
                v_dim=c.v_dim,
                eps=_LATENT_EPS,
                scale=c.scale,
                bias=c.bias,
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
    ("model.layers.*.self_attn.q_proj", "layers.*.mixer.q"),
    ("model.layers.*.self_attn.q_a_proj", "layers.*.mixer.q_down"),
    ("model.layers.*.self_attn.q_a_layernorm", "layers.*.mixer.q_norm"),
    ("model.layers.*.self_attn.q_b_proj", "layers.*.mixer.q"),
    ("model.layers.*.self_attn.kv_a_proj_with_mqa", "layers.*.mixer.kv_down"),
    ("model.layers.*.self_attn.kv_a_layernorm", "layers.*.mixer.kv_norm"),
    ("model.layers.*.self_attn.kv_b_proj", "layers.*.mixer.up", Interleaved("k", "v")),
    ("model.layers.*.self_attn.o_proj", "layers.*.mixer.out"),
    ("model.layers.*.self_attn.rotary_emb", None),
    ("model.layers.*.post_attention_layernorm", "layers.*.ffn_norm"),
    ("model.norm", "norm"),
    ("lm_head", "head"),
)
