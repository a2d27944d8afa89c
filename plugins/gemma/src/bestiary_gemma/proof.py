"""What proves Gemma: small configurations as published, and the class that knows the answer."""

from bestiary.testing import Case, Transformers

__all__ = ["CASES", "PUBLISHED"]

PUBLISHED = {
    "model_type": "gemma",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 48,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "gelu",
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "torch_dtype": "float32",
}
#: Releases before 5.24 took the published `hidden_act` at its word, which means the approximation.
REFERENCE = Transformers("GemmaForCausalLM", changes={"hidden_act": "gelu_pytorch_tanh"})

CASES = (
    Case(
        "2b: one head of keys",
        PUBLISHED,
        REFERENCE,
        mutations={
            "the norms' epsilon": {"rms_norm_eps": 0.5},
            "the base": {"rope_theta": 100.0},
            "the heads' size": {"head_dim": 32},
        },
    ),
    Case(
        "7b: a head of keys each, biases, a head of its own",
        {**PUBLISHED, "num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": False},
        REFERENCE,
        mutations={"biases": {"attention_bias": False}},
    ),
)
