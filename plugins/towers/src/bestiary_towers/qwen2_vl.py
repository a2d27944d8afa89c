"""Qwen2-VL's vision tower (Wang et al. 2024, arXiv 2409.12191): pictures and videos of any size, merged at the end."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from bestiary.blocks import (
    MLP,
    Activation,
    EncoderAttention,
    EncoderLayer,
    Items,
    LayerNorm,
    Linear,
    PatchEmbedding,
)
from bestiary.blocks.leaf import Block
from bestiary.checkpoint import ConfigFile, Names, Split
from bestiary_towers.grid import axial_angles, places

__all__ = ["NAMES", "Config", "Merger", "Tower", "describe"]

_EPS = 1e-6
_BASE = 10000.0


@dataclass(frozen=True)
class Config:
    """What a vision_config says of a Qwen2-VL."""

    width: int
    inner: int
    layers: int
    heads: int
    channels: int
    patch_size: int
    frames: int
    merge: int
    outputs: int
    act: Activation

    @classmethod
    def read(cls, section: ConfigFile) -> Self:
        """Raises ConfigUnsupported for sizes that do not fit each other."""
        width, heads = section.size("embed_dim", 1280), section.size("num_heads", 16)
        section.must(width % (4 * heads) == 0, "num_heads", f"is {heads}; four times it must divide embed_dim, {width}")
        return cls(
            width=width,
            inner=int(width * section.get("mlp_ratio", float, 4.0)),
            layers=section.size("depth", 32),
            heads=heads,
            channels=section.size(("in_channels", "in_chans"), 3),
            patch_size=section.size(("patch_size", "spatial_patch_size"), 14),
            frames=section.size("temporal_patch_size", 2),
            merge=section.size("spatial_merge_size", 2),
            outputs=section.size("hidden_size", 3584),
            act=section.expect("hidden_act", "quick_gelu", "gelu", "silu", default="quick_gelu"),
        )


class Merger(Block):
    """Each `merge` x `merge` patches, which follow each other, to one vector of the language model."""

    def __init__(self, width: int, outputs: int, merge: int) -> None:
        super().__init__()
        inner = width * merge**2
        self.inner = inner
        self.norm = LayerNorm(width, _EPS)
        self.up, self.down = Linear(inner, inner, "column", bias=True), Linear(inner, outputs, "row", bias=True)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, width] to [T / merge², outputs]."""
        merged = self.norm(x_TD)[0].reshape(-1, self.inner)
        return self.down(self.up.activated(merged, "gelu"))


class Tower(Block):
    """Patches to merged vectors; a patch sees its own frame, and turns with its row and column there."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.merge = c.merge
        self.turned = c.width // c.heads // 2
        self.embed = PatchEmbedding(c.channels, c.patch_size, c.width, frames=c.frames)
        self.layers = nn.ModuleList(
            EncoderLayer(
                mix_norm=LayerNorm(c.width, _EPS),
                mixer=EncoderAttention(c.width, heads=c.heads),
                ffn_norm=LayerNorm(c.width, _EPS),
                ffn=MLP(c.width, c.inner, act=c.act),
            )
            for _ in range(c.layers)
        )
        self.merger = Merger(c.width, c.outputs, c.merge)

    def forward(self, patches_TP: Tensor, grids_N3: Tensor) -> Tensor:
        """[T, numbers of a patch] to [T / merge², outputs], items one after the other.

        `grids_N3`: steps in time, rows and columns of each item's patches, whose order is that of `pixels.flatten`.
        """
        x_TD = self.embed(patches_TP)
        frequencies = _BASE ** -(torch.arange(0, self.turned, 2, dtype=torch.float32) / self.turned)
        lengths: list[int] = []
        angles: list[Tensor] = []
        for steps, rows, columns in grids_N3.tolist():
            lengths += [rows * columns] * steps
            angles += [axial_angles(places(rows, columns, self.merge), frequencies, frequencies)] * steps
        items = Items(tuple(lengths), torch.cat(angles).to(x_TD.device))
        for layer in self.layers:
            x_TD = layer(x_TD, items)
        y_TD: Tensor = self.merger(x_TD)
        return y_TD


def describe(c: Config) -> Tower:
    """Patches [T, channels x frames x patch x patch] and grids [N, 3] to [T / merge², outputs]."""
    return Tower(c)


NAMES = Names(
    ("patch_embed.proj", "embed"),
    ("blocks.*.norm1", "layers.*.mix_norm"),
    ("blocks.*.attn.qkv", "layers.*.mixer.qkv", Split("q", "k", "v")),
    ("blocks.*.attn.proj", "layers.*.mixer.out"),
    ("blocks.*.norm2", "layers.*.ffn_norm"),
    ("blocks.*.mlp.fc1", "layers.*.ffn.up"),
    ("blocks.*.mlp.fc2", "layers.*.ffn.down"),
    ("merger.ln_q", "merger.norm"),
    ("merger.mlp.0", "merger.up"),
    ("merger.mlp.2", "merger.down"),
)
