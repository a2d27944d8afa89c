"""What proves Llama: small configurations of every published generation, and the class that knows the answer."""

from bestiary.testing import Case, Naming, Transformers

__all__ = ["CASES"]

PUBLISHED = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False}
REFERENCE = Transformers("LlamaForCausalLM")

CASES = (
    Case(
        "2: a head of keys each",
        {**PUBLISHED, "num_key_value_heads": None},
        REFERENCE,
        mutations={"the norms' epsilon": {"rms_norm_eps": 0.5}, "the base": {"rope_theta": 100.0}},
        namings=(
            Naming(
                "with the frequencies, and with the angles",
                repeats=tuple(
                    ("model.norm.weight", f"model.layers.0.self_attn.rotary_emb.{name}")
                    for name in ("inv_freq", "cos_cached", "sin_cached")
                ),
            ),
        ),
    ),
    Case(
        "3.1: groups, stretched positions",
        {**PUBLISHED, "rope_theta": 500000.0, "rope_scaling": LLAMA3},
        REFERENCE,
        mutations={"the stretch": {"rope_scaling": None}},
    ),
    Case(
        "3.2: tied, heads of their own size",
        {**PUBLISHED, "head_dim": 48, "tie_word_embeddings": True, "num_key_value_heads": 1},
        REFERENCE,
        mutations={"the heads' size": {"head_dim": 32}},
    ),
    Case(
        "biases, positions divided",
        {**PUBLISHED, "attention_bias": True, "mlp_bias": True, "rope_scaling": {"type": "linear", "factor": 4.0}},
        REFERENCE,
        mutations={
            "the stretch": {"rope_scaling": None},
            "biases of attention": {"attention_bias": False},
            "biases of the MLP": {"mlp_bias": False},
        },
    ),
    Case(
        "positions stretched between dimensions that are no whole numbers",
        {**PUBLISHED, "rope_scaling": YARN},
        REFERENCE,
        mutations={"that they are none": {"rope_scaling": {**YARN, "truncate": True}}},
    ),
)
