"""What proves DeepSeek-V2: small configurations as published, and the class that knows the answer."""

from bestiary.testing import Case, Transformers

__all__ = ["CASES"]

YARN = {
    "type": "yarn",
    "factor": 8,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 16,
}
PUBLISHED = {
    "model_type": "deepseek_v2",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 160,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 4.0,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": YARN,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
REFERENCE = Transformers("DeepseekV2ForCausalLM")

CASES = (
    Case(
        "V2",
        PUBLISHED,
        REFERENCE,
        mutations={
            "stretched positions": {"rope_scaling": None},
            "the temperature": {"rope_scaling": {**YARN, "mscale_all_dim": 0}},
            "groups of experts": {"topk_method": "greedy"},
            "the experts' scale": {"routed_scaling_factor": 1.0},
            "dense layers": {"first_k_dense_replace": 0},
            "shared experts": {"n_shared_experts": None},
        },
    ),
    Case(
        "Lite",
        {**PUBLISHED, "q_lora_rank": None, "topk_method": "greedy", "routed_scaling_factor": 1.0, "rope_scaling": None},
        REFERENCE,
        mutations={"positions": {"rope_theta": 100}, "experts chosen": {"num_experts_per_tok": 1}},
    ),
)
