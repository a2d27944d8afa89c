"""GGUF files of the Llama family in Hugging Face's terms: names, the order of rows, config.json."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bestiary.checkpoint.gguf import GGUFFile, Stored, write_folder
from bestiary.errors import CheckpointMalformed, ConfigUnsupported

__all__ = ["import_gguf"]

TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
LAYER_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.(.+)")
# The parts whose rows GGUF stores in another order, and the setting that says how many heads they have.
HEADS = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}


def import_gguf(source: Path, folder: Path) -> None:
    """Write a Llama's GGUF file as the Hugging Face-layout `folder`, with bfloat16 weights.

    Raises CheckpointMalformed where the file is not whole or not a Llama, ConfigUnsupported where it asks for
    something that config.json could not say, and whatever `write_folder` raises.
    """
    gguf = GGUFFile.open(source)
    config = _config(gguf)
    write_folder(folder, gguf, config, _weights(gguf, config))


def _config(gguf: GGUFFile) -> dict[str, Any]:
    if (held := gguf.need("general.architecture", str)) != "llama":
        raise CheckpointMalformed(f"{gguf.path}: it holds the architecture {held!r}, not 'llama'")
    scaling = gguf.get("llama.rope.scaling.type", str, "none")
    if scaling != "none" or "rope_freqs.weight" in gguf.names:
        raise ConfigUnsupported(
            f"{gguf.path}: its rotary embedding is scaled, which is not imported from GGUF; "
            "take the model's original folder instead"
        )
    hidden, heads = gguf.need("llama.embedding_length", int), gguf.need("llama.attention.head_count", int)
    head_dim = gguf.get("llama.attention.key_length", int, hidden // max(heads, 1))
    if gguf.get("llama.rope.dimension_count", int, head_dim) != head_dim:
        raise ConfigUnsupported(
            f"{gguf.path}: llama.rope.dimension_count is not {head_dim}, a head's size: heads that are rotated in part "
            "are not imported from GGUF; take the model's original folder instead"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": gguf.need("llama.feed_forward_length", int),
        "max_position_embeddings": gguf.need("llama.context_length", int),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": gguf.need("llama.block_count", int),
        "num_key_value_heads": gguf.get("llama.attention.head_count_kv", int, heads),
        "rms_norm_eps": gguf.need("llama.attention.layer_norm_rms_epsilon", float),
        "rope_scaling": None,
        "rope_theta": gguf.get("llama.rope.freq_base", float, 10000.0),
        "tie_word_embeddings": "output.weight" not in gguf.names,
        "torch_dtype": "bfloat16",
        "vocab_size": gguf.shape("token_embd.weight")[0],
    }


def _weights(gguf: GGUFFile, config: dict[str, Any]) -> dict[str, Stored]:
    weights = {}
    for name in gguf.names:
        match = LAYER_NAME.fullmatch(name)
        if name in TOP:
            weights[TOP[name]] = Stored(name)
        elif match and match[2] in LAYER and int(match[1]) < config["num_hidden_layers"]:
            weights[f"model.layers.{match[1]}.{LAYER[match[2]]}"] = _stored(gguf, name, match[2], config)
        else:
            raise CheckpointMalformed(f"{gguf.path}: the tensor {name!r} has no place in a Llama")
    expected = len(TOP) - config["tie_word_embeddings"] + len(LAYER) * config["num_hidden_layers"]
    if len(weights) != expected:  # each of them has a place of its own, so that the number tells
        raise CheckpointMalformed(
            f"{gguf.path}: {len(weights)} tensors, where a Llama of its size has {expected}; "
            "if it is one part of a model, join the parts first (llama-gguf-split --merge)"
        )
    return weights


def _stored(gguf: GGUFFile, name: str, part: str, config: dict[str, Any]) -> Stored:
    if part not in HEADS:
        return Stored(name)
    heads, rows = config[HEADS[part]], gguf.shape(name)[0]
    if rows != heads * config["head_dim"] or config["head_dim"] % 2:
        raise CheckpointMalformed(f"{gguf.path}: {name!r} has {rows} rows, for {heads} heads of {config['head_dim']}")
    return Stored(name, partial(_half_split, heads=heads))


def _half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo the row order of GGUF's q and k: there a rotated pair stands side by side, here half a head apart."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
