"""What proves Falcon: small configurations of its three generations as published, and the class that knows."""

from bestiary.testing import Case, Transformers

__all__ = ["CASES"]

PUBLISHED = {
    "model_type": "falcon",
    "vocab_size": 96,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "layer_norm_epsilon": 1e-5,
    "multi_query": True,
    "parallel_attn": True,
    "new_decoder_architecture": False,
    "bias": False,
    "alibi": False,
    "torch_dtype": "float32",
}
#: Not eager: there transformers 5.23 adds the biases of the distance twice, once by the mask and once by itself.
REFERENCE = Transformers("FalconForCausalLM", attention="sdpa")
GROUPED = {**PUBLISHED, "new_decoder_architecture": True, "num_kv_heads": 2}

RW = {
    **PUBLISHED,
    "hidden_size": 192,
    "num_attention_heads": 3,
    "multi_query": False,
    "parallel_attn": False,
    "bias": True,
    "alibi": True,
}
FIRST = {
    "model_type": "RefinedWeb",
    "vocab_size": 96,
    "hidden_size": 128,
    "n_layer": 2,
    "n_head": 4,
    "n_head_kv": 2,
    "layer_norm_epsilon": 1e-5,
    "bias": False,
    "alibi": False,
    "torch_dtype": "float32",
}


def _modern(config: dict[str, object]) -> dict[str, object]:
    """The keys of the first published files as the class knows them."""
    names = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads"}
    found = {names.get(key, key): value for key, value in config.items()}
    return {**found, "model_type": "falcon", "new_decoder_architecture": "n_head_kv" in config}


CASES = (
    Case(
        "7B: one head of keys, one norm",
        PUBLISHED,
        REFERENCE,
        mutations={
            "side by side": {"parallel_attn": False},
            "one head of keys": {"multi_query": False},
            "the norms' epsilon": {"layer_norm_epsilon": 0.5},
            "positions": {"alibi": True},
        },
    ),
    Case(
        "40B: groups, two norms",
        GROUPED,
        REFERENCE,
        mutations={"two norms": {"num_ln_in_parallel_attn": 1}, "groups": {"num_kv_heads": 1}},
    ),
    Case(
        "11B: groups, one norm",
        {**GROUPED, "num_ln_in_parallel_attn": 1, "bias": True, "ffn_hidden_size": 160},
        REFERENCE,
        mutations={"biases": {"bias": False}, "the inner width": {"ffn_hidden_size": None}},
    ),
    Case(
        "RW: a head of keys each, ALiBi, one after the other",
        RW,
        REFERENCE,
        mutations={"ALiBi": {"alibi": False}, "one after the other": {"parallel_attn": True}},
    ),
    Case("first published keys", FIRST, Transformers("FalconForCausalLM", config=_modern, attention="sdpa")),
)
