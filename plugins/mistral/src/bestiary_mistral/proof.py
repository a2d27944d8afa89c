"""What proves Mistral: small configurations as published, and the class that knows the answer."""

from bestiary.testing import Case, Transformers

__all__ = ["CASES", "PUBLISHED"]

PUBLISHED = {
    "model_type": "mistral",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 8,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
REFERENCE = Transformers("MistralForCausalLM")

CASES = (
    Case(
        "7B v0.1: a window",
        PUBLISHED,
        REFERENCE,
        mutations={
            "the window": {"sliding_window": None},
            "its size": {"sliding_window": 9},
            "the norms' epsilon": {"rms_norm_eps": 0.5},
        },
    ),
    Case(
        "Nemo: heads of their own size, no window",
        {**PUBLISHED, "head_dim": 48, "sliding_window": None, "rope_theta": 1000000.0},
        REFERENCE,
        mutations={"the base": {"rope_theta": 10000.0}, "the heads' size": {"head_dim": 32}},
    ),
)
