"""What proves Gemma 2: small configurations as published, and the class that knows the answer."""

from bestiary.testing import Case, Transformers
from bestiary_gemma import proof

__all__ = ["CASES", "PUBLISHED"]

PUBLISHED = {
    **proof.PUBLISHED,
    "model_type": "gemma2",
    "num_key_value_heads": 2,
    "sliding_window": 8,
    "query_pre_attn_scalar": 32,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 5.0,
}

CASES = (
    Case(
        "9b: windows in every other layer",
        PUBLISHED,
        Transformers("Gemma2ForCausalLM"),
        mutations={
            "the window": {"sliding_window": 64},
            "the cap of scores": {"attn_logit_softcapping": None},
            "the cap of logits": {"final_logit_softcapping": None},
            "the scale": {"query_pre_attn_scalar": 256},
            "which layers have a window": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "the norms' epsilon": {"rms_norm_eps": 0.5},
        },
    ),
    Case(
        "caps as they are where nothing says so",
        {key: value for key, value in PUBLISHED.items() if not key.endswith("softcapping")},
        Transformers("Gemma2ForCausalLM"),
        mutations={
            "the cap of scores": {"attn_logit_softcapping": 3.0},
            "the cap of logits": {"final_logit_softcapping": 5.0},
            "the activation": {"hidden_activation": "gelu"},
        },
    ),
    Case(
        "no caps",
        {**PUBLISHED, "attn_logit_softcapping": None, "final_logit_softcapping": None},
        Transformers("Gemma2ForCausalLM"),
    ),
)
