"""Whisper's encoder (Radford et al. 2022, arXiv 2212.04356): two convolutions over time, then a transformer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

import bestiary_kernels as kernels
from bestiary.blocks import (
    MLP,
    Activation,
    Convolution1d,
    EncoderAttention,
    EncoderLayer,
    Items,
    LayerNorm,
    Learned,
)
from bestiary.blocks.leaf import Block
from bestiary.checkpoint import ConfigFile, Names
from bestiary.errors import RequestError

__all__ = ["NAMES", "Config", "Tower", "describe"]

_EPS = 1e-5


@dataclass(frozen=True)
class Config:
    """What a configuration says of a Whisper's encoder."""

    width: int
    inner: int
    layers: int
    heads: int
    bins: int
    positions: int
    act: Activation

    @classmethod
    def read(cls, section: ConfigFile) -> Self:
        """Raises ConfigUnsupported for sizes that do not fit each other."""
        width, heads = section.size("d_model", 384), section.size("encoder_attention_heads", 6)
        section.must(width % heads == 0, "encoder_attention_heads", f"is {heads}; it must divide d_model, {width}")
        return cls(
            width=width,
            inner=section.size("encoder_ffn_dim", 1536),
            layers=section.size("encoder_layers", 4),
            heads=heads,
            bins=section.size("num_mel_bins", 80),
            positions=section.size("max_source_positions", 1500),
            act=section.expect("activation_function", "gelu", "relu", "silu", default="gelu"),
        )

    @staticmethod
    def num_states(frames: int) -> int:
        """How many vectors the tower makes of so many frames."""
        return (frames + 1) // 2


class Tower(Block):
    """Spectrograms of any length up to the table of positions, to a vector for every two frames."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.into = Convolution1d(c.bins, c.width, taps=3, padding=1)
        self.halve = Convolution1d(c.width, c.width, taps=3, stride=2, padding=1)
        self.positions = Learned(c.positions, c.width)
        self.layers = nn.ModuleList(
            EncoderLayer(
                mix_norm=LayerNorm(c.width, _EPS),
                mixer=EncoderAttention(c.width, heads=c.heads, biases=("q", "v")),
                ffn_norm=LayerNorm(c.width, _EPS),
                ffn=MLP(c.width, c.inner, act=c.act),
            )
            for _ in range(c.layers)
        )
        self.norm = LayerNorm(c.width, _EPS)

    def forward(self, spectrograms: Sequence[Tensor], heard: Sequence[int] | None = None) -> Tensor:
        """Spectrograms [bins, frames] to [states of all, width], one after the other.

        `heard`: how many states of each are of sound. The others, of silence that was added, are made too, and no
        state sees them. Raises RequestError for a spectrogram that is too long.
        """
        parts = [self._embedded(frames_BF) for frames_BF in spectrograms]
        lengths, x_TD = tuple(len(part) for part in parts), torch.cat(parts)
        masks = None
        if heard is not None:
            counts = zip(lengths, heard, strict=True)
            masks = tuple((torch.arange(length, device=x_TD.device) < n).expand(1, length, -1) for length, n in counts)
        items = Items(lengths, masks=masks)
        for layer in self.layers:
            x_TD = layer(x_TD, items)
        y_TD: Tensor = self.norm(x_TD)[0]
        return y_TD

    def _embedded(self, frames_BF: Tensor) -> Tensor:
        """[states, width] of one spectrogram, with their positions."""
        states, most = Config.num_states(frames_BF.shape[1]), self.positions.shape[0]
        if states > most:
            raise RequestError(f"the audio has {frames_BF.shape[1]} frames; the model hears at most {2 * most}: cut it")
        x_DF = kernels.activation(self.into(frames_BF), "gelu")
        x_DT = kernels.activation(self.halve(x_DF), "gelu")
        return x_DT.T + self.positions.weight[:states]


def describe(c: Config) -> Tower:
    """Spectrograms [bins, frames] of any lengths to [states of all, width]."""
    return Tower(c)


NAMES = Names(
    ("conv1", "into"),
    ("conv2", "halve"),
    ("embed_positions", "positions"),
    *((f"layers.*.self_attn.{part}_proj", f"layers.*.mixer.qkv[{part}]") for part in "qkv"),
    ("layers.*.self_attn.out_proj", "layers.*.mixer.out"),
    ("layers.*.self_attn_layer_norm", "layers.*.mix_norm"),
    ("layers.*.final_layer_norm", "layers.*.ffn_norm"),
    ("layers.*.fc1", "layers.*.ffn.up"),
    ("layers.*.fc2", "layers.*.ffn.down"),
    ("layer_norm", "norm"),
)
