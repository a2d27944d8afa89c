"""What proves BLOOM: small configurations as published, and the class that knows the answer."""

from bestiary.testing import Case, Naming, Transformers

__all__ = ["CASES"]

PUBLISHED = {
    "model_type": "bloom",
    "vocab_size": 96,
    "hidden_size": 128,
    "n_layer": 3,
    "n_head": 4,
    "layer_norm_epsilon": 1e-5,
    "seq_length": 128,
    "apply_residual_connection_post_layernorm": False,
    "torch_dtype": "float32",
}
REFERENCE = Transformers("BloomForCausalLM")

CASES = (
    Case(
        "560m",
        PUBLISHED,
        REFERENCE,
        mutations={"heads and their slopes": {"n_head": 2}, "the norms' epsilon": {"layer_norm_epsilon": 0.5}},
        namings=(Naming("as first published", ((r"^transformer\.", ""),)),),
    ),
    Case("176B: a number of heads that is no power of two", {**PUBLISHED, "hidden_size": 192, "n_head": 6}, REFERENCE),
)
