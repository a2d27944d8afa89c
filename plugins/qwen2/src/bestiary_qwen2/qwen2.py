"""Qwen2 (Yang et al. 2024, arXiv 2407.10671): Llama's blocks, with biases on queries, keys and values alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from bestiary.blocks import Attention, Decoder, Embedding, GatedMLP, Head, Layer, Layers, MoE, Pooler, RMSNorm, Rope
from bestiary.checkpoint import ConfigFile, Names

__all__ = ["NAMES", "Config", "describe", "trunk"]


@dataclass(frozen=True)
class Config:
    """What config.json says of a Qwen2."""

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
    #: Of each layer; None: it sees all.
    windows: tuple[int | None, ...]
    tied: bool

    @classmethod
    def read(cls, file: ConfigFile) -> Self:
        """Raises ConfigUnsupported for what no published Qwen2 has."""
        file.expect("hidden_act", "silu", default="silu")
        width, heads = file.size("hidden_size"), file.size("num_attention_heads")
        kv_heads = file.size("num_key_value_heads", heads)
        file.must(heads % kv_heads == 0, "num_key_value_heads", f"is {kv_heads}; it must divide the {heads} heads")
        own_size = "head_dim" in file
        file.must(own_size or width % heads == 0, "hidden_size", f"is {width}; {heads} heads must divide it")
        head_dim = file.size("head_dim", max(width // heads, 1))
        rope = Rope.read(file, head_dim)
        layers = file.size("num_hidden_layers")
        return cls(
            vocab_size=file.size("vocab_size"),
            hidden_size=width,
            intermediate_size=file.size("intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            context=rope.reach(file.size("max_position_embeddings", 32768)),
            eps=file.get("rms_norm_eps", float, 1e-6),
            rope=rope,
            bias=file.get("qkv_bias", bool, True),
            windows=_windows(file, layers),
            tied=file.get("tie_word_embeddings", bool, False),
        )


def _windows(file: ConfigFile, layers: int) -> tuple[int | None, ...]:
    """A window from layer `max_window_layers` on, where one is used, or in the layers that the file lists."""
    if not file.get("use_sliding_window", bool, False):
        return (None,) * layers
    window, first = file.size("sliding_window", 4096), file.get("max_window_layers", int, 28)
    usual = tuple("sliding_attention" if i >= first else "full_attention" for i in range(layers))
    types = file.get("layer_types", tuple[str, ...], usual)
    known = set(types) <= {"full_attention", "sliding_attention"} and len(types) == layers
    file.must(known, "layer_types", f"is {types}; it must say full_attention or sliding_attention of each layer")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def trunk(c: Config, head: Head | Pooler, ffn: Callable[[int], GatedMLP | MoE] | None = None) -> Decoder:
    """The tree of a Qwen2 under any head, with any feed-forward block in each layer."""

    def layer(i: int) -> Layer:
        return Layer(
            mix_norm=RMSNorm(c.hidden_size, c.eps),
            mixer=Attention(
                c.hidden_size,
                heads=c.heads,
                kv_heads=c.kv_heads,
                head_dim=c.head_dim,
                rope=c.rope,
                bias=c.bias,
                window=c.windows[i],
            ),
            ffn_norm=RMSNorm(c.hidden_size, c.eps),
            ffn=GatedMLP(c.hidden_size, c.intermediate_size) if ffn is None else ffn(i),
        )

    return Decoder(
        embed=Embedding(c.vocab_size, c.hidden_size),
        layers=Layers(c.layers, layer),
        norm=RMSNorm(c.hidden_size, c.eps),
        head=head,
        context=c.context,
    )


def describe(c: Config) -> Decoder:
    """The tree of a Qwen2 that writes."""
    return trunk(c, Head(c.vocab_size, c.hidden_size, tied=c.tied))


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
