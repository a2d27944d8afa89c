"""Mamba (Gu and Dao 2023, arXiv 2312.00752): a stack of selective state spaces, and no attention at all."""

import math
from dataclasses import dataclass
from typing import Self

from bestiary.blocks import Decoder, Embedding, Head, Layers, Mamba, MixerLayer, RMSNorm
from bestiary.checkpoint import ConfigFile, Names, Split

__all__ = ["NAMES", "Config", "describe"]

#: A state is as large after any number of tokens, so that the model itself sets no limit; this one is high enough.
_CONTEXT = 2**20


@dataclass(frozen=True)
class Config:
    """What config.json says of a Mamba."""

    vocab_size: int
    hidden_size: int
    inner: int
    layers: int
    state: int
    taps: int
    step_rank: int
    eps: float
    bias: bool
    conv_bias: bool
    tied: bool

    @classmethod
    def read(cls, file: ConfigFile) -> Self:
        """Raises ConfigUnsupported for what no published Mamba has."""
        file.expect("hidden_act", "silu", default="silu")
        width = file.size("hidden_size")
        inner = file.size("expand", 2) * width
        stated = file.size("intermediate_size", inner)
        file.must(stated == inner, "intermediate_size", f"is {stated}, and expand x hidden_size is {inner}")
        auto = file.values.get("time_step_rank", "auto") == "auto"
        return cls(
            vocab_size=file.size("vocab_size"),
            hidden_size=width,
            inner=inner,
            layers=file.size("num_hidden_layers"),
            state=file.size("state_size", 16),
            taps=file.size("conv_kernel", 4),
            step_rank=math.ceil(width / 16) if auto else file.size("time_step_rank"),
            eps=file.get("layer_norm_epsilon", float, 1e-5),
            bias=file.get("use_bias", bool, False),
            conv_bias=file.get("use_conv_bias", bool, True),
            tied=file.get("tie_word_embeddings", bool, True),
        )


def describe(c: Config) -> Decoder:
    """The tree of a Mamba."""

    def layer(i: int) -> MixerLayer:
        return MixerLayer(
            mix_norm=RMSNorm(c.hidden_size, c.eps),
            mixer=Mamba(
                c.hidden_size,
                inner=c.inner,
                state=c.state,
                taps=c.taps,
                step_rank=c.step_rank,
                bias=c.bias,
                conv_bias=c.conv_bias,
            ),
        )

    return Decoder(
        embed=Embedding(c.vocab_size, c.hidden_size),
        layers=Layers(c.layers, layer),
        norm=RMSNorm(c.hidden_size, c.eps),
        head=Head(c.vocab_size, c.hidden_size, tied=c.tied),
        context=_CONTEXT,
    )


NAMES = Names(
    ("backbone.embeddings", "embed"),
    ("backbone.embedding", "embed"),  # as first published
    ("backbone.layers.*.norm", "layers.*.mix_norm"),
    ("backbone.layers.*.mixer.in_proj", "layers.*.mixer.into", Split("x", "z")),
    ("backbone.layers.*.mixer.conv1d", "layers.*.mixer.conv"),
    ("backbone.layers.*.mixer.x_proj", "layers.*.mixer.select"),
    ("backbone.layers.*.mixer.dt_proj", "layers.*.mixer.step"),
    ("backbone.layers.*.mixer.A_log", "layers.*.mixer.decay:weight"),
    ("backbone.layers.*.mixer.D", "layers.*.mixer.skip:weight"),
    ("backbone.layers.*.mixer.out_proj", "layers.*.mixer.out"),
    ("backbone.norm_f", "norm"),
    ("lm_head", "head"),
)
