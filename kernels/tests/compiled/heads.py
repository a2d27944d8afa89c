"""A matrix for each head, as DeepSeek-V2 has them."""

import torch

from bestiary_kernels import heads_linear


def absorbed_keys() -> None:
    q, out = torch.empty(8, 128, 192, dtype=torch.bfloat16), torch.empty(8, 128, 576, dtype=torch.bfloat16)
    heads_linear(q[..., :128], torch.empty(128, 128, 512, dtype=torch.bfloat16), out[..., :512])


def values() -> None:
    heads_linear(torch.empty(64, 16, 512), torch.empty(16, 512, 128))
