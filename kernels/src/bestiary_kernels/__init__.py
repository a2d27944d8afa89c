"""Bestiary's kernels: each operation as a clear torch reference and, on the CPU, a C++ function chosen at run time.

Knows nothing of models, caches as a whole or scheduling; an operation sees tensors and numbers only.
"""

from bestiary_kernels.activation import gated_activation
from bestiary_kernels.attention import paged_attention
from bestiary_kernels.embedding import embedding
from bestiary_kernels.library import Status, status, using
from bestiary_kernels.linear import PackedLinear
from bestiary_kernels.measure import matmul_flops, read_bandwidth
from bestiary_kernels.norm import add_rms_norm
from bestiary_kernels.rotary import rotary_cache_write
from bestiary_kernels.tape import Arena, Tape

__all__ = [
    "Arena",
    "PackedLinear",
    "Status",
    "Tape",
    "add_rms_norm",
    "embedding",
    "gated_activation",
    "matmul_flops",
    "paged_attention",
    "read_bandwidth",
    "rotary_cache_write",
    "status",
    "using",
]
