"""What proves Jamba: small configurations as published, and the class that knows the answer."""

from bestiary.testing import Case, Transformers

__all__ = ["CASES"]

PUBLISHED = {
    "model_type": "jamba",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": 8,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "use_mamba_kernels": False,
    "torch_dtype": "float32",
}
REFERENCE = Transformers("JambaForCausalLM")

CASES = (
    Case(
        "mini",
        PUBLISHED,
        REFERENCE,
        mutations={
            "where attention stands": {"attn_layer_offset": 2},
            "where experts stand": {"expert_layer_offset": 0},
            "experts chosen": {"num_experts_per_tok": 1},
            "the norms' epsilon": {"rms_norm_eps": 0.5},
            "the convolution's bias": {"mamba_conv_bias": False},
        },
    ),
    Case(
        "without experts",
        {**PUBLISHED, "num_experts": 1, "num_experts_per_tok": 1, "mamba_proj_bias": True, "tie_word_embeddings": True},
        REFERENCE,
        mutations={"the projections' bias": {"mamba_proj_bias": False}},
    ),
)
