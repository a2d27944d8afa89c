"""What proves GPT-2: small configurations as published, and the class that knows the answer."""

from bestiary.testing import Case, Naming, Transformers

__all__ = ["CASES"]

PUBLISHED = {
    "model_type": "gpt2",
    "vocab_size": 96,
    "n_embd": 128,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "n_ctx": 128,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "torch_dtype": "float32",
}
REFERENCE = Transformers("GPT2LMHeadModel")

CASES = (
    Case(
        "gpt2",
        PUBLISHED,
        REFERENCE,
        mutations={
            "the activation": {"activation_function": "relu"},
            "the scale": {"scale_attn_weights": False},
            "the norms' epsilon": {"layer_norm_epsilon": 0.5},
        },
        namings=(Naming("as first published", ((r"^transformer\.", ""),)),),
    ),
    Case(
        "scaled by the layer, narrow inside, a head of its own",
        {**PUBLISHED, "scale_attn_by_inverse_layer_idx": True, "n_inner": 96, "tie_word_embeddings": False},
        REFERENCE,
        mutations={
            "the scale by layer": {"scale_attn_by_inverse_layer_idx": False},
            "the inner width": {"n_inner": None},
        },
    ),
)
