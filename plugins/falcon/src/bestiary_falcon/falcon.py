"""Falcon (Almazrouei et al. 2023, arXiv 2311.16867): three generations, most with attention and MLP side by side."""

from dataclasses import dataclass
from typing import Self

from bestiary.blocks import (
    MLP,
    Alibi,
    Attention,
    Decoder,
    Embedding,
    Head,
    Layer,
    LayerNorm,
    Layers,
    ParallelLayer,
    Rope,
)
from bestiary.checkpoint import ConfigFile, Interleaved, Names

__all__ = ["NAMES", "Config", "describe"]


@dataclass(frozen=True)
class Config:
    """What config.json says of a Falcon."""

    vocab_size: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    eps: float
    rope: Rope | None
    bias: bool
    parallel: bool
    #: Norms of a layer whose halves stand side by side.
    norms: int
    tied: bool

    @classmethod
    def read(cls, file: ConfigFile) -> Self:
        """Raises ConfigUnsupported for what no published Falcon has."""
        file.expect("activation", "gelu", default="gelu")
        width, heads = file.size(("hidden_size", "n_embed")), file.size(("num_attention_heads", "n_head"))
        file.must(width % heads == 0, "hidden_size", f"is {width}; {heads} heads must divide it")
        grouped = file.get("new_decoder_architecture", bool, "n_head_kv" in file)
        parallel = grouped or file.get("parallel_attn", bool, True)
        norms = file.get("num_ln_in_parallel_attn", int, 2 if grouped else 1)
        file.must(norms in (1, 2), "num_ln_in_parallel_attn", f"is {norms}; it must be 1 or 2")
        alone = 1 if file.get("multi_query", bool, True) else heads
        kv_heads = file.size(("num_kv_heads", "n_head_kv"), heads) if grouped else alone
        file.must(heads % kv_heads == 0, "num_kv_heads", f"is {kv_heads}; it must divide the {heads} heads")
        return cls(
            vocab_size=file.size("vocab_size"),
            width=width,
            inner=file.size("ffn_hidden_size", 4 * width),
            layers=file.size(("num_hidden_layers", "n_layer")),
            heads=heads,
            kv_heads=kv_heads,
            context=file.size("max_position_embeddings", 2048),
            eps=file.get("layer_norm_epsilon", float, 1e-5),
            rope=None if _has_alibi(file, width // heads) else Rope.read(file, width // heads),
            bias=file.get("bias", bool, False),
            parallel=parallel,
            norms=norms if grouped else 1,
            tied=file.get("tie_word_embeddings", bool, True),
        )


def _has_alibi(file: ConfigFile, head_dim: int) -> bool:
    """They are rounded before they are scaled; scaled first, as here, they agree where the scale is a power of two."""
    has = file.get("alibi", bool, False)
    exact = (head_dim & (head_dim - 1)) == 0 and head_dim.bit_length() % 2 == 1
    file.must(not has or exact, "alibi", f"is true with heads of {head_dim}; it needs 16, 64 or 256")
    return has


def describe(c: Config) -> Decoder:
    """The tree of a Falcon."""
    head_dim = c.width // c.heads
    # Biases of the distance are added to what is scaled afterwards, and formed in bfloat16.
    alibi = Alibi(c.heads, factor=head_dim**-0.5, rounded=True) if c.rope is None else None

    def layer(i: int) -> Layer | ParallelLayer:
        mixer = Attention(
            c.width,
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=head_dim,
            rope=c.rope,
            alibi=alibi,
            bias=c.bias,
            out_bias=c.bias,
        )
        ffn = MLP(c.width, c.inner, act="gelu", bias=c.bias)
        mix_norm, ffn_norm = LayerNorm(c.width, c.eps), LayerNorm(c.width, c.eps)
        if not c.parallel:
            return Layer(mix_norm=mix_norm, mixer=mixer, ffn_norm=ffn_norm, ffn=ffn)
        return ParallelLayer(mix_norm=mix_norm, mixer=mixer, ffn=ffn, ffn_norm=ffn_norm if c.norms == 2 else None)

    return Decoder(
        embed=Embedding(c.vocab_size, c.width),
        layers=Layers(c.layers, layer),
        norm=LayerNorm(c.width, c.eps),
        head=Head(c.vocab_size, c.width, tied=c.tied),
        context=c.context,
    )


NAMES = Names(
    ("transformer.word_embeddings", "embed"),
    ("transformer.h.*.input_layernorm", "layers.*.mix_norm"),
    ("transformer.h.*.ln_attn", "layers.*.mix_norm"),
    ("transformer.h.*.ln_mlp", "layers.*.ffn_norm"),
    ("transformer.h.*.post_attention_layernorm", "layers.*.ffn_norm"),
    ("transformer.h.*.self_attention.query_key_value", "layers.*.mixer.qkv", Interleaved("q", "k", "v")),
    ("transformer.h.*.self_attention.dense", "layers.*.mixer.out"),
    ("transformer.h.*.mlp.dense_h_to_4h", "layers.*.ffn.up"),
    ("transformer.h.*.mlp.dense_4h_to_h", "layers.*.ffn.down"),
    ("transformer.ln_f", "norm"),
    ("lm_head", "head"),
)
