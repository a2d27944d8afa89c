"""The vision tower of Llama 3.2 (Llama Team 2024, arXiv 2407.21783): a picture's tiles see each other throughout."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary.blocks import (
    MLP,
    Activation,
    Embedding,
    EncoderAttention,
    EncoderLayer,
    Items,
    LayerNorm,
    Learned,
    PatchEmbedding,
    patches,
)
from bestiary.blocks.leaf import Block
from bestiary.checkpoint import ConfigFile, Names

__all__ = ["NAMES", "Config", "GatedLayer", "GatedTable", "Tower"]

_EPS = 1e-5  # of the two norms that configurations do not speak of
_GATED = (("embedding", "table"), ("gate", "gate"))
#: A tile's tokens are filled up to a multiple of so many.
_MULTIPLE = 8


@dataclass(frozen=True)
class Config:
    """What a vision_config says."""

    width: int
    inner: int
    layers: int
    global_layers: int
    heads: int
    channels: int
    side: int
    patch: int
    tiles: int
    canvases: int
    features: tuple[int, ...]
    act: Activation
    eps: float

    @classmethod
    def read(cls, section: ConfigFile) -> Self:
        """Raises ConfigUnsupported for sizes that do not fit each other."""
        width, heads = section.size("hidden_size", 1280), section.size(("attention_heads", "num_attention_heads"), 16)
        layers = section.size("num_hidden_layers", 32)
        features = section.get("intermediate_layers_indices", tuple[int, ...], (3, 7, 15, 23, 30))
        section.must(width % heads == 0, "attention_heads", f"is {heads}; it must divide hidden_size, {width}")
        known = all(0 <= feature < layers for feature in features)
        section.must(known, "intermediate_layers_indices", f"is {list(features)}; the tower has {layers} layers")
        section.expect("vision_output_dim", width * (1 + len(features)), default=width * (1 + len(features)))
        return cls(
            width=width,
            inner=section.size("intermediate_size", 5120),
            layers=layers,
            global_layers=section.size("num_global_layers", 8),
            heads=heads,
            channels=section.size("num_channels", 3),
            side=section.size("image_size", 448),
            patch=section.size("patch_size", 14),
            tiles=section.size("max_num_tiles", 4),
            canvases=len(section.values.get("supported_aspect_ratios") or range(8)),
            features=features,
            act=section.expect("hidden_act", "gelu", "quick_gelu", default="gelu"),
            eps=section.get("norm_eps", float, 1e-5),
        )

    @property
    def tokens(self) -> int:
        """Vectors of a tile: its patches', and one of the whole."""
        return (self.side // self.patch) ** 2 + 1

    @property
    def outputs(self) -> int:
        """Numbers of a vector: the last layer's, and those of the layers before that are looked into."""
        return self.width * (1 + len(self.features))


class GatedTable(Block):
    """A row for each canvas and tile, let through by a gate."""

    def __init__(self, c: Config, numbers: int) -> None:
        super().__init__()
        self.tiles, self.gate = c.tiles, Learned(1)
        self.table = Embedding(c.canvases + 1, c.tiles * numbers)

    def forward(self, canvas: Tensor) -> Tensor:
        """[tiles, numbers] of a canvas's number."""
        y_TN: Tensor = self.table(canvas.view(1)).view(self.tiles, -1) * self.gate.weight.tanh()
        return y_TN


class GatedLayer(EncoderLayer):
    """A layer each half of which a gate lets through."""

    def __init__(self, *, mix_norm: LayerNorm, mixer: Block, ffn_norm: LayerNorm, ffn: Block) -> None:
        super().__init__(mix_norm=mix_norm, mixer=mixer, ffn_norm=ffn_norm, ffn=ffn)
        self.mix_gate, self.ffn_gate = Learned(1), Learned(1)

    def forward(self, x_TD: Tensor, items: Items) -> Tensor:
        """[T, width] to [T, width]."""
        x_TD = x_TD + self.mix_gate.weight.tanh() * self.mixer(self.mix_norm(x_TD)[0], items)
        y_TD: Tensor = x_TD + self.ffn_gate.weight.tanh() * self.ffn(self.ffn_norm(x_TD)[0], items)
        return y_TD


class Tower(Block):
    """Layers of which some are looked into, then gated ones, over all tiles of a picture at once."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.embed = PatchEmbedding(c.channels, c.patch, c.width)
        self.class_token, self.positions = Learned(c.width), Learned(c.tokens, c.width)
        self.tile_positions = GatedTable(c, c.tokens * c.width)
        self.before, self.after = (GatedTable(c, c.width) for _ in range(2))
        self.pre_norm, self.post_norm = LayerNorm(c.width, _EPS), LayerNorm(c.width, _EPS)

        def layer(kind: type[EncoderLayer]) -> EncoderLayer:
            return kind(
                mix_norm=LayerNorm(c.width, c.eps),
                mixer=EncoderAttention(c.width, heads=c.heads, biases=(), out_bias=False),
                ffn_norm=LayerNorm(c.width, c.eps),
                ffn=MLP(c.width, c.inner, act=c.act),
            )

        self.layers = nn.ModuleList(layer(EncoderLayer) for _ in range(c.layers))
        self.global_layers = nn.ModuleList(layer(GatedLayer) for _ in range(c.global_layers))

    def forward(self, pixels_NCHW: Tensor, canvas: Tensor) -> Tensor:
        """[tiles x tokens, outputs] of a picture's tiles and its canvas's number; tiles that it lacks come last."""
        c, seen = self.c, len(pixels_NCHW)
        x_NLD = self._embedded(F.pad(pixels_NCHW, (0,) * 7 + (c.tiles - seen,)), canvas)
        filling = -c.tokens % _MULTIPLE
        x_TD = F.pad(x_NLD, (0, 0, 0, filling)).flatten(0, 1)
        length = c.tokens + filling
        # What fills up sees the picture, but not each other; the picture sees it all.
        is_filling = torch.arange(length).ge(c.tokens) | torch.arange(c.tiles).ge(seen)[:, None]
        is_filling = is_filling.flatten().to(x_TD.device)
        items = Items((len(x_TD),), masks=(~(is_filling[:, None] & is_filling)[None],))
        found = []
        for number, layer in enumerate(self.layers):
            x_TD = layer(x_TD, items)
            found += [x_TD] * c.features.count(number)
        x_TD = self.post_norm(x_TD)[0]
        x_TD = (x_TD.view(c.tiles, length, -1) + self.after(canvas)[:, None]).flatten(0, 1)
        for layer in self.global_layers:
            x_TD = layer(x_TD, items)
        # The features of one number of the width stand side by side.
        y_TD = torch.cat((x_TD, torch.stack(found, -1).flatten(1)), 1)
        return y_TD.view(c.tiles, length, -1)[:, : c.tokens].flatten(0, 1)

    def _embedded(self, pixels_NCHW: Tensor, canvas: Tensor) -> Tensor:
        """[tiles, tokens, width]."""
        c = self.c
        x_NPD = self.embed(patches(pixels_NCHW, c.patch)).view(c.tiles, -1, c.width) + self.before(canvas)[:, None]
        x_NLD = torch.cat((self.class_token.weight.expand(c.tiles, 1, -1), x_NPD), 1)
        whole = (1 - self.tile_positions.gate.weight.tanh()) * self.positions.weight
        x_NLD = x_NLD + whole + self.tile_positions(canvas).view(c.tiles, c.tokens, -1)
        y_NLD: Tensor = self.pre_norm(x_NLD.flatten(0, 1))[0].view(x_NLD.shape)
        return y_NLD


def _layers(source: str, path: str) -> Names:
    return Names(
        *((f"{source}.*.self_attn.{part}_proj", f"{path}.*.mixer.qkv[{part}]") for part in "qkv"),
        (f"{source}.*.self_attn.o_proj", f"{path}.*.mixer.out"),
        (f"{source}.*.input_layernorm", f"{path}.*.mix_norm"),
        (f"{source}.*.post_attention_layernorm", f"{path}.*.ffn_norm"),
        (f"{source}.*.mlp.fc1", f"{path}.*.ffn.up"),
        (f"{source}.*.mlp.fc2", f"{path}.*.ffn.down"),
        (f"{source}.*.gate_attn", f"{path}.*.mix_gate"),
        (f"{source}.*.gate_ffn", f"{path}.*.ffn_gate"),
    )


NAMES = (
    _layers("transformer.layers", "layers")
    + _layers("global_transformer.layers", "global_layers")
    + Names(
        ("patch_embedding", "embed"),
        ("class_embedding", "class_token"),
        ("gated_positional_embedding.embedding", "positions"),
        ("gated_positional_embedding.tile_embedding", "tile_positions.table"),
        ("gated_positional_embedding.gate", "tile_positions.gate"),
        *((f"pre_tile_positional_embedding.{old}", f"before.{new}") for old, new in _GATED),
        *((f"post_tile_positional_embedding.{old}", f"after.{new}") for old, new in _GATED),
        ("layernorm_pre", "pre_norm"),
        ("layernorm_post", "post_norm"),
    )
)
