"""Pixtral's vision tower (Agrawal et al. 2024, arXiv 2410.07073): pictures of any size that patches divide."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from bestiary.blocks import EncoderAttention, EncoderLayer, Gate, GatedMLP, Items, PatchEmbedding, RMSNorm, patches
from bestiary.blocks.leaf import Block
from bestiary.checkpoint import ConfigFile, Names
from bestiary_towers.features import after, streams
from bestiary_towers.grid import axial_angles, places

__all__ = ["MISTRAL_NAMES", "NAMES", "Config", "Tower", "describe"]

_EPS = 1e-5


@dataclass(frozen=True)
class Config:
    """What a vision_config says of a Pixtral."""

    width: int
    inner: int
    layers: int
    heads: int
    channels: int
    image_size: int
    patch_size: int
    base: float
    act: Gate

    @classmethod
    def read(cls, section: ConfigFile) -> Self:
        """Raises ConfigUnsupported for sizes that do not fit each other."""
        width, heads = section.size("hidden_size", 1024), section.size("num_attention_heads", 16)
        section.must(
            width % (4 * heads) == 0,
            "num_attention_heads",
            f"is {heads}; four times it must divide hidden_size, {width}",
        )
        section.expect("head_dim", width // heads, default=width // heads)
        return cls(
            width=width,
            inner=section.size("intermediate_size", 4096),
            layers=section.size("num_hidden_layers", 24),
            heads=heads,
            channels=section.size("num_channels", 3),
            image_size=section.size("image_size", 1024),
            patch_size=section.size("patch_size", 16),
            base=section.rope(10000.0).theta,
            act=section.expect("hidden_act", "gelu", "silu", default="gelu"),
        )


class Tower(Block):
    """Pictures to a vector for each patch, taken after the layers that `features` names (`features.after`)."""

    def __init__(self, c: Config, *, features: Sequence[int], interleaved: bool) -> None:
        super().__init__()
        self.patch_size, self.base, self.head_dim = c.patch_size, c.base, c.width // c.heads
        self.depths = after(features, c.layers)
        self.embed = PatchEmbedding(c.channels, c.patch_size, c.width)
        self.norm = RMSNorm(c.width, _EPS)
        self.layers = nn.ModuleList(
            EncoderLayer(
                mix_norm=RMSNorm(c.width, _EPS),
                mixer=EncoderAttention(c.width, heads=c.heads, biases=(), out_bias=False, interleaved=interleaved),
                ffn_norm=RMSNorm(c.width, _EPS),
                ffn=GatedMLP(c.width, c.inner, act=c.act),
            )
            for _ in range(c.layers)
        )

    def forward(self, pictures: Sequence[Tensor]) -> Tensor:
        """Pictures [C, height, width], normalised, to [patches of all, width x features], one after the other."""
        grids = [[side // self.patch_size for side in picture.shape[1:]] for picture in pictures]
        x_TD = self.embed(torch.cat([patches(picture[None], self.patch_size) for picture in pictures]))
        x_TD = self.norm(x_TD)[0]
        frequencies = self.base ** -(torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim)
        angles = axial_angles(torch.cat([places(*grid) for grid in grids]), frequencies[0::2], frequencies[1::2])
        items = Items(tuple(rows * columns for rows, columns in grids), angles.to(x_TD.device))
        return streams(self.layers, x_TD, items, self.depths)


def describe(c: Config, *, features: Sequence[int] = (-1,), interleaved: bool = False) -> Tower:
    """Pictures [C, height, width] of any sizes to [patches of all, width x features].

    `interleaved`: queries and keys lie as in Mistral's own files (`MISTRAL_NAMES`), neighbours turning together.
    """
    return Tower(c, features=features, interleaved=interleaved)


#: As transformers stores it.
NAMES = Names(
    ("patch_conv", "embed"),
    ("ln_pre", "norm"),
    ("transformer.layers.*.attention_norm", "layers.*.mix_norm"),
    *((f"transformer.layers.*.attention.{part}_proj", f"layers.*.mixer.qkv[{part}]") for part in "qkv"),
    ("transformer.layers.*.attention.o_proj", "layers.*.mixer.out"),
    ("transformer.layers.*.ffn_norm", "layers.*.ffn_norm"),
    ("transformer.layers.*.feed_forward.gate_proj", "layers.*.ffn.gate_up[gate]"),
    ("transformer.layers.*.feed_forward.up_proj", "layers.*.ffn.gate_up[up]"),
    ("transformer.layers.*.feed_forward.down_proj", "layers.*.ffn.down"),
)

#: As Mistral stores it, for a tower that is `interleaved`.
MISTRAL_NAMES = Names(
    ("patch_conv", "embed"),
    ("ln_pre", "norm"),
    ("transformer.layers.*.attention_norm", "layers.*.mix_norm"),
    *((f"transformer.layers.*.attention.w{part}", f"layers.*.mixer.qkv[{part}]") for part in "qkv"),
    ("transformer.layers.*.attention.wo", "layers.*.mixer.out"),
    ("transformer.layers.*.ffn_norm", "layers.*.ffn_norm"),
    ("transformer.layers.*.feed_forward.w1", "layers.*.ffn.gate_up[gate]"),
    ("transformer.layers.*.feed_forward.w3", "layers.*.ffn.gate_up[up]"),
    ("transformer.layers.*.feed_forward.w2", "layers.*.ffn.down"),
)
