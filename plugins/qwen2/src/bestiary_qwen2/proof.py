"""What proves Qwen2: small configurations as published, and the class that knows the answer."""

from bestiary.testing import Case, Transformers

__all__ = ["CASES", "PUBLISHED"]

PUBLISHED = {
    "model_type": "qwen2",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "sliding_window": 8,
    "max_window_layers": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
REFERENCE = Transformers("Qwen2ForCausalLM")

CASES = (
    Case(
        "7B",
        PUBLISHED,
        REFERENCE,
        mutations={
            "the norms' epsilon": {"rms_norm_eps": 0.5},
            "the base": {"rope_theta": 100.0},
            "that no window is used": {"use_sliding_window": True},
        },
    ),
    Case(
        "0.5B: tied, and a window from the second layer on",
        {**PUBLISHED, "tie_word_embeddings": True, "use_sliding_window": True},
        REFERENCE,
        mutations={"the window": {"use_sliding_window": False}, "where it begins": {"max_window_layers": 2}},
    ),
    Case(
        "stretched to four times its length",
        {
            **PUBLISHED,
            "max_position_embeddings": 32,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        },
        REFERENCE,
        mutations={"the stretch": {"rope_scaling": None, "max_position_embeddings": 128}},
    ),
    Case(
        "heads of their own size",
        {**PUBLISHED, "head_dim": 48},
        REFERENCE,
        mutations={"the heads' size": {"head_dim": 32}},
    ),
)
