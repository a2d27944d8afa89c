"""The checkpoints that need no download: the demo's real one, and random weights in a Llama's shape, made once."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

__all__ = ["ENVS", "folder"]

ENVS = Path(os.environ.get("BESTIARY_BENCH_ENVS") or Path.home() / ".cache/bestiary/bench-envs")
RANDOM: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1280,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "num_attention_heads": 20,
    "num_key_value_heads": 5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def folder(name: str) -> Path:
    """`demo`, `random-0.5b`, or a folder as it is given."""
    if name == "demo":
        from bestiary import hub

        return hub.locate("demo")
    if name == "random-0.5b":
        return _random(ENVS / "models" / name)
    if not (Path(name) / "config.json").exists():
        raise argparse.ArgumentTypeError(f"{name} is no folder with a config.json, nor demo or random-0.5b")
    return Path(name)


def _random(place: Path) -> Path:
    if (place / "config.json").exists():
        return place
    import torch
    from safetensors.torch import save_file

    place.mkdir(parents=True, exist_ok=True)
    generator, c = torch.Generator().manual_seed(0), RANDOM
    width, inner, vocabulary = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    narrow = width // c["num_attention_heads"] * c["num_key_value_heads"]
    shapes = {"model.embed_tokens": (vocabulary, width), "lm_head": (vocabulary, width), "model.norm": (width,)}
    for layer in range(c["num_hidden_layers"]):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.{name}": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{stem}.self_attn.{name}_proj": (width, width) for name in "qo"}
        shapes |= {f"{stem}.self_attn.{name}_proj": (narrow, width) for name in "kv"}
        shapes |= {f"{stem}.mlp.{name}_proj": (inner, width) for name in ("gate", "up")}
        shapes[f"{stem}.mlp.down_proj"] = (width, inner)
    tensors = {
        f"{name}.weight": torch.ones(shape).bfloat16()
        if len(shape) == 1
        else (torch.randn(shape, generator=generator) * shape[1] ** -0.5).bfloat16()
        for name, shape in shapes.items()
    }
    save_file(tensors, place / "unfinished", {"format": "pt"})
    (place / "unfinished").rename(place / "model.safetensors")
    (place / "config.json").write_text(json.dumps(c, indent=1))
    return place
