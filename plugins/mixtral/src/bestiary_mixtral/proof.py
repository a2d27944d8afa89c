"""What proves Mixtral: small configurations as published, both layouts of its experts, and the class that knows."""

from typing import TYPE_CHECKING

from bestiary.testing import Case, Transformers

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CASES"]

PUBLISHED = {
    "model_type": "mixtral",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def _packed(tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """As newer files have it: all experts of a layer in two tensors."""
    import torch

    found = {name: tensor for name, tensor in tensors.items() if "block_sparse_moe" not in name}
    for layer in range(3):
        old, new = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        found[f"{new}.gate.weight"] = tensors[f"{old}.gate.weight"]
        w1, w2, w3 = ([tensors[f"{old}.experts.{e}.w{n}.weight"] for e in range(4)] for n in (1, 2, 3))
        both = [torch.cat(pair) for pair in zip(w1, w3, strict=True)]
        found[f"{new}.experts.gate_up_proj"] = torch.stack(both)
        found[f"{new}.experts.down_proj"] = torch.stack(w2)
    return found


CASES = (
    Case(
        "8x7B: an expert a tensor",
        PUBLISHED,
        Transformers("MixtralForCausalLM"),
        mutations={"experts chosen": {"num_experts_per_tok": 1}, "the base": {"rope_theta": 100.0}},
    ),
    Case(
        "all experts in one tensor, and a window",
        {**PUBLISHED, "sliding_window": 8},
        Transformers("MixtralForCausalLM", tensors=_packed),
        mutations={"the window": {"sliding_window": None}},
    ),
    Case(
        "what files may leave out",
        {key: value for key, value in PUBLISHED.items() if key not in ("rope_theta", "rms_norm_eps")},
        Transformers("MixtralForCausalLM"),
        mutations={"the base": {"rope_theta": 10000.0}, "the norms' epsilon": {"rms_norm_eps": 1e-2}},
    ),
)
