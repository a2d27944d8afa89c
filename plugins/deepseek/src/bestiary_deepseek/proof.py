"""What proves DeepSeek MoE, which transformers lacks: Qwen2-MoE computes the same once a few tensors are made to.

Its shared expert counts half where its gate's weights are zero, so that one of doubled outputs counts in full.
"""

from typing import TYPE_CHECKING, Any

from bestiary.testing import Case, Transformers

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CASES"]

PUBLISHED = {
    "model_type": "deepseek",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 160,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def _twin(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the Qwen2-MoE that computes the same."""
    same = {key: value for key, value in config.items() if key not in ("model_type", "rope_theta")}
    return {
        **same,
        "num_experts": config["n_routed_experts"],
        "shared_expert_intermediate_size": config["n_shared_experts"] * config["moe_intermediate_size"],
        "mlp_only_layers": list(range(config["first_k_dense_replace"])),
        "rope_theta": float(config["rope_theta"]),
    }


def _made_alike(tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Biases, gates and doubled outputs as they must be; to be loaded back into the twin."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias", "shared_expert_gate.weight")):
            found[name] = tensor * 0
        elif name.endswith("shared_expert.down_proj.weight"):
            found[name] = tensor * 2
        else:
            found[name] = tensor
    return found


def _published(tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """The names and values of a DeepSeek MoE."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias", "shared_expert_gate.weight")):
            continue
        is_halved = name.endswith("shared_expert.down_proj.weight")
        found[name.replace("shared_expert.", "shared_experts.")] = tensor / 2 if is_halved else tensor
    return found


REFERENCE = Transformers("Qwen2MoeForCausalLM", config=_twin, weights=_made_alike, tensors=_published)

CASES = (
    Case(
        "16B",
        PUBLISHED,
        REFERENCE,
        mutations={
            "how weights add up": {"norm_topk_prob": True},
            "dense layers": {"first_k_dense_replace": 0},
            "experts chosen": {"num_experts_per_tok": 1},
            "shared experts": {"n_shared_experts": None},
        },
    ),
    Case("weights that add up", {**PUBLISHED, "norm_topk_prob": True}, REFERENCE),
)
