"""What proves Mamba: small configurations as published, and the class that knows the answer."""

from bestiary.testing import Case, Naming, Transformers

__all__ = ["CASES"]

PUBLISHED = {
    "model_type": "mamba",
    "vocab_size": 96,
    "hidden_size": 96,
    "intermediate_size": 192,
    "expand": 2,
    "state_size": 8,
    "conv_kernel": 4,
    "num_hidden_layers": 3,
    "time_step_rank": 6,
    "layer_norm_epsilon": 1e-5,
    "hidden_act": "silu",
    "use_bias": False,
    "use_conv_bias": True,
    "residual_in_fp32": True,
    "torch_dtype": "float32",
}

CASES = (
    Case(
        "130m",
        PUBLISHED,
        Transformers("MambaForCausalLM"),
        mutations={
            "the norms' epsilon": {"layer_norm_epsilon": 0.5},
            "the convolution's bias": {"use_conv_bias": False},
        },
        namings=(Naming("first published", ((r"^backbone\.embeddings\.", "backbone.embedding."),)),),
    ),
    Case(
        "biases, own head, wide state",
        {
            **PUBLISHED,
            "use_bias": True,
            "use_conv_bias": False,
            "state_size": 16,
            "conv_kernel": 3,
            "tie_word_embeddings": False,
            "time_step_rank": "auto",
        },
        Transformers("MambaForCausalLM"),
        mutations={"the projections' bias": {"use_bias": False}, "the head of its own": {"tie_word_embeddings": True}},
    ),
)
