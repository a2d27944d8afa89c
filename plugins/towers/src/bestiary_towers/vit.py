"""The vision transformer for pictures of one size (Dosovitskiy et al. 2020, arXiv 2010.11929), in all its options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from bestiary.blocks import (
    MLP,
    Activation,
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
from bestiary_towers.features import after, streams

__all__ = ["LAYERS", "ViT", "ViTConfig"]

_ACTIVATIONS: dict[str, Activation] = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class ViTConfig:
    """What a vision_config says of such a tower. What the file leaves out is as in `defaults`."""

    width: int
    inner: int
    layers: int
    heads: int
    channels: int
    image_size: int
    patch_size: int
    act: Activation
    eps: float

    defaults: ClassVar[Mapping[str, Any]]

    @classmethod
    def read(cls, section: ConfigFile) -> Self:
        """Raises ConfigUnsupported for sizes that do not fit each other."""

        def size(key: str) -> int:
            return section.size(key, cls.defaults[key])

        width, heads = size("hidden_size"), size("num_attention_heads")
        image, patch = size("image_size"), size("patch_size")
        section.must(width % heads == 0, "num_attention_heads", f"is {heads}; it must divide hidden_size, {width}")
        section.must(patch <= image, "patch_size", f"is {patch}; a picture of {image} has no patch")
        return cls(
            width=width,
            inner=size("intermediate_size"),
            layers=size("num_hidden_layers"),
            heads=heads,
            channels=section.size("num_channels", 3),
            image_size=image,
            patch_size=patch,
            act=_ACTIVATIONS[section.expect("hidden_act", *_ACTIVATIONS, default=cls.defaults["hidden_act"])],
            eps=section.get("layer_norm_eps", float, cls.defaults["layer_norm_eps"]),
        )

    @property
    def grid(self) -> int:
        """Patches in a row, and rows."""
        return self.image_size // self.patch_size


class ViT(Block):
    """Pictures to a vector for each patch, taken after the layers that `features` names (`features.after`).

    A `class_token` stands before the patches, and comes out only if `keep_class`. `post_norm` makes the last norm that
    the checkpoint may have part of the tower, `normed` applies it to what comes out.
    """

    def __init__(
        self,
        c: ViTConfig,
        *,
        class_token: bool,
        keep_class: bool = False,
        features: Sequence[int] = (-1,),
        patch_bias: bool = False,
        pre_norm: bool = False,
        post_norm: bool = False,
        normed: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size, self.dropped = c.patch_size, int(class_token and not keep_class)
        self.depths, self.normed = after(features, c.layers), normed
        self.embed = PatchEmbedding(c.channels, c.patch_size, c.width, bias=patch_bias)
        self.class_token = Learned(c.width) if class_token else None
        self.positions = Learned(c.grid**2 + class_token, c.width)
        self.pre_norm = LayerNorm(c.width, c.eps) if pre_norm else None
        self.layers = nn.ModuleList(
            EncoderLayer(
                mix_norm=LayerNorm(c.width, c.eps),
                mixer=EncoderAttention(c.width, heads=c.heads),
                ffn_norm=LayerNorm(c.width, c.eps),
                ffn=MLP(c.width, c.inner, act=c.act),
            )
            for _ in range(c.layers)
        )
        self.post_norm = LayerNorm(c.width, c.eps) if post_norm else None

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """Pictures of the tower's size, normalised, to [N, patches, width x features]."""
        n = pixels_NCHW.shape[0]
        embedded_PD = self.embed(patches(pixels_NCHW, self.patch_size))
        x_NLD = embedded_PD.view(n, -1, embedded_PD.shape[1])
        if self.class_token is not None:
            x_NLD = torch.cat((self.class_token.weight.expand(n, 1, -1), x_NLD), 1)
        x_TD = (x_NLD + self.positions.weight).flatten(0, 1)
        if self.pre_norm is not None:
            x_TD = self.pre_norm(x_TD)[0]
        x_TD = streams(self.layers, x_TD, Items((x_NLD.shape[1],) * n), self.depths)
        if self.post_norm is not None and self.normed:
            x_TD = self.post_norm(x_TD)[0]
        return x_TD.view(n, -1, x_TD.shape[1])[:, self.dropped :]


#: Rows that towers of transformers' making have in common; older files have all of it behind `vision_model.`.
LAYERS = Names(
    ("embeddings.patch_embedding", "embed"),
    ("embeddings.position_embedding", "positions"),
    ("embeddings.position_ids", None),
    *((f"encoder.layers.*.self_attn.{part}_proj", f"layers.*.mixer.qkv[{part}]") for part in "qkv"),
    ("encoder.layers.*.self_attn.out_proj", "layers.*.mixer.out"),
    ("encoder.layers.*.layer_norm1", "layers.*.mix_norm"),
    ("encoder.layers.*.layer_norm2", "layers.*.ffn_norm"),
    ("encoder.layers.*.mlp.fc1", "layers.*.ffn.up"),
    ("encoder.layers.*.mlp.fc2", "layers.*.ffn.down"),
)
