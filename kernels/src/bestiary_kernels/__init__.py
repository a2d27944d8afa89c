"""Bestiary's kernels: each operation as a clear torch reference and, on the CPU, a C++ function chosen at run time.

Knows nothing of models, caches as a whole or scheduling; an operation sees tensors and numbers only.
"""

from bestiary_kernels import gpu
from bestiary_kernels.activation import activation, gated_activation
from bestiary_kernels.attention import paged_attention
from bestiary_kernels.convolution import causal_conv
from bestiary_kernels.embedding import embedding
from bestiary_kernels.graph import Graph
from bestiary_kernels.heads import heads_linear
from bestiary_kernels.latent import cache_write, latent_attention
from bestiary_kernels.library import Status, status, using
from bestiary_kernels.linear import PackedLinear
from bestiary_kernels.lora import lora
from bestiary_kernels.measure import matmul_flops, read_bandwidth
from bestiary_kernels.moe import SqueezedExperts, experts_linear, moe, route
from bestiary_kernels.norm import add_layer_norm, add_rms_norm
from bestiary_kernels.pointwise import add, scaled
from bestiary_kernels.quantised import QuantisedLinear, dequantise, quantise
from bestiary_kernels.rotary import rotary, rotary_cache_write
from bestiary_kernels.sampling import draw, greedy
from bestiary_kernels.scan import selective_scan
from bestiary_kernels.tape import Arena, Onward, Tape

__all__ = [
    "Arena",
    "Graph",
    "Onward",
    "PackedLinear",
    "QuantisedLinear",
    "SqueezedExperts",
    "Status",
    "Tape",
    "activation",
    "add",
    "add_layer_norm",
    "add_rms_norm",
    "cache_write",
    "causal_conv",
    "dequantise",
    "draw",
    "embedding",
    "experts_linear",
    "gated_activation",
    "gpu",
    "greedy",
    "heads_linear",
    "latent_attention",
    "lora",
    "matmul_flops",
    "moe",
    "paged_attention",
    "quantise",
    "read_bandwidth",
    "rotary",
    "rotary_cache_write",
    "route",
    "scaled",
    "selective_scan",
    "status",
    "using",
]
