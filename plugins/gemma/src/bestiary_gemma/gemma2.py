"""Gemma 2 (Gemma Team 2024, arXiv 2408.00118): every other layer has a window; caps hold what grows."""

from dataclasses import dataclass
from typing import Self

from bestiary.blocks import Attention, Decoder, Embedding, GatedMLP, Head, Layers, Pooler, SandwichLayer
from bestiary.checkpoint import ConfigFile, Names
from bestiary_gemma import gemma

__all__ = ["NAMES", "Config", "describe", "trunk"]

#: Where the file leaves them out; a null is no cap.
_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


@dataclass(frozen=True)
class Config:
    """What config.json says of a Gemma 2."""

    base: gemma.Config
    scale: float
    #: Of each layer; None: it sees all.
    windows: tuple[int | None, ...]
    score_cap: float | None
    logit_cap: float | None

    @classmethod
    def read(cls, file: ConfigFile) -> Self:
        """Raises ConfigUnsupported for what no published Gemma 2 has."""
        file = file.filled(_CAPS)
        # Unlike the first Gemma's, this key means what it says.
        file.expect("hidden_activation", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
        base = gemma.Config.read(file)
        window = file.get("sliding_window", int, 4096)
        file.must(window > 0, "sliding_window", f"is {window}; it must be at least 1")
        alternating = tuple(("full_attention" if i % 2 else "sliding_attention") for i in range(base.layers))
        types = file.get("layer_types", tuple[str, ...], alternating)
        known = set(types) <= {"full_attention", "sliding_attention"} and len(types) == base.layers
        file.must(known, "layer_types", f"is {types}; it must say full_attention or sliding_attention of each layer")
        return cls(
            base=base,
            scale=file.get("query_pre_attn_scalar", float, 256.0) ** -0.5,
            windows=tuple(window if kind == "sliding_attention" else None for kind in types),
            score_cap=file.get("attn_logit_softcapping", float),
            logit_cap=file.get("final_logit_softcapping", float),
        )


def trunk(c: Config, head: Head | Pooler) -> Decoder:
    """The tree of a Gemma 2 under any head."""
    b = c.base

    def layer(i: int) -> SandwichLayer:
        return SandwichLayer(
            mix_norm=b.norm(),
            mixer=Attention(
                b.hidden_size,
                heads=b.heads,
                kv_heads=b.kv_heads,
                head_dim=b.head_dim,
                rope=b.rope,
                bias=b.bias,
                out_bias=b.bias,
                scale=c.scale,
                window=c.windows[i],
                softcap=c.score_cap,
            ),
            mix_post_norm=b.norm(),
            ffn_norm=b.norm(),
            ffn=GatedMLP(b.hidden_size, b.intermediate_size, act="gelu_tanh"),
            ffn_post_norm=b.norm(),
        )

    return Decoder(
        embed=Embedding(b.vocab_size, b.hidden_size),
        embed_scale=b.hidden_size**0.5,
        layers=Layers(b.layers, layer),
        norm=b.norm(),
        head=head,
        context=b.context,
    )


def describe(c: Config) -> Decoder:
    """The tree of a Gemma 2 that writes."""
    return trunk(c, Head(c.base.vocab_size, c.base.hidden_size, tied=c.base.tied, softcap=c.logit_cap))


NAMES = (
    gemma.NAMES
    + Names(
        ("model.layers.*.post_attention_layernorm", "layers.*.mix_post_norm"),
        ("model.layers.*.pre_feedforward_layernorm", "layers.*.ffn_norm"),
        ("model.layers.*.post_feedforward_layernorm", "layers.*.ffn_post_norm"),
    )
).optional("model.")
