"""What architectures are assembled from: torch modules that hold a description until a pass allocates them."""

from bestiary.blocks.alibi import Alibi
from bestiary.blocks.attention import Attention
from bestiary.blocks.cross import CrossAttention
from bestiary.blocks.decoder import Decoder, Encoder, Head, Layers
from bestiary.blocks.encoder import Convolution1d, EncoderAttention, EncoderLayer, Items, PatchEmbedding, patches
from bestiary.blocks.kept import Crossed, Kept, Kind, Latent, PagedKV, State
from bestiary.blocks.latent import LatentAttention
from bestiary.blocks.layer import Layer, MixerLayer, ParallelLayer, PostNormLayer, SandwichLayer
from bestiary.blocks.leaf import Leaf, Learned
from bestiary.blocks.linear import Embedding, Format, Linear
from bestiary.blocks.lowrank import Adaptable, Lanes, Over, Update
from bestiary.blocks.mixer import Mixer
from bestiary.blocks.mlp import MLP, Activation, Gate, GatedMLP
from bestiary.blocks.moe import Experts, MoE, Routing
from bestiary.blocks.norm import LayerNorm, Norm, RMSNorm
from bestiary.blocks.pooling import Pooler, Scores
from bestiary.blocks.rotary import Rope
from bestiary.blocks.statespace import Mamba

__all__ = [
    "MLP",
    "Activation",
    "Adaptable",
    "Alibi",
    "Attention",
    "Convolution1d",
    "CrossAttention",
    "Crossed",
    "Decoder",
    "Embedding",
    "Encoder",
    "EncoderAttention",
    "EncoderLayer",
    "Experts",
    "Format",
    "Gate",
    "GatedMLP",
    "Head",
    "Items",
    "Kept",
    "Kind",
    "Lanes",
    "Latent",
    "LatentAttention",
    "Layer",
    "LayerNorm",
    "Layers",
    "Leaf",
    "Learned",
    "Linear",
    "Mamba",
    "Mixer",
    "MixerLayer",
    "MoE",
    "Norm",
    "Over",
    "PagedKV",
    "ParallelLayer",
    "PatchEmbedding",
    "Pooler",
    "PostNormLayer",
    "RMSNorm",
    "Rope",
    "Routing",
    "SandwichLayer",
    "Scores",
    "State",
    "Update",
    "patches",
]
