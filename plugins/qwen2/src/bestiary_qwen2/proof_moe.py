"""What proves Qwen2-MoE: small configurations as published, and the class that knows the answer."""

from bestiary.testing import Case, Transformers
from bestiary_qwen2 import proof

__all__ = ["CASES"]

PUBLISHED = {
    **proof.PUBLISHED,
    "model_type": "qwen2_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 96,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
REFERENCE = Transformers("Qwen2MoeForCausalLM")

CASES = (
    Case(
        "A2.7B",
        PUBLISHED,
        REFERENCE,
        mutations={"how weights add up": {"norm_topk_prob": True}, "experts chosen": {"num_experts_per_tok": 1}},
    ),
    Case(
        "experts in every other layer, weights that add up",
        {**PUBLISHED, "norm_topk_prob": True, "decoder_sparse_step": 2, "num_hidden_layers": 4, "mlp_only_layers": [3]},
        REFERENCE,
        mutations={"how weights add up": {"norm_topk_prob": False}, "dense layers": {"mlp_only_layers": []}},
    ),
    Case(
        "a window in every other of the first layers",
        {**PUBLISHED, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        REFERENCE,
        mutations={"which layers have it": {"max_window_layers": 3}, "the window": {"use_sliding_window": False}},
    ),
)
