"""What architectures are assembled from: torch modules that hold a description until a pass allocates them."""

from bestiary.blocks.attention import Attention
from bestiary.blocks.decoder import Decoder, Head, Layer, Layers
from bestiary.blocks.kept import Kept, Latent, PagedKV, State
from bestiary.blocks.leaf import Leaf
from bestiary.blocks.linear import Embedding, Linear
from bestiary.blocks.mixer import Mixer
from bestiary.blocks.mlp import GatedMLP
from bestiary.blocks.norm import RMSNorm
from bestiary.blocks.rotary import Rope

__all__ = [
    "Attention",
    "Decoder",
    "Embedding",
    "GatedMLP",
    "Head",
    "Kept",
    "Latent",
    "Layer",
    "Layers",
    "Leaf",
    "Linear",
    "Mixer",
    "PagedKV",
    "RMSNorm",
    "Rope",
    "State",
]
