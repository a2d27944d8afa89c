"""Published configurations in their full size: without a weight, the tree has as many numbers as the reference's class.

Small configurations say everything; published ones leave out what their class in transformers knows by itself.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bestiary import model, registry
from bestiary.blocks import Attention
from bestiary.checkpoint import ConfigFile

CLIP_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "projection_dim": 2048,
    "vision_use_head": False,
}
#: Architecture, name, config.json.
PUBLISHED: list[tuple[str, str, dict[str, Any]]] = [
    (
        "LlamaForCausalLM",
        "Llama-3.1-8B",
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
        },
    ),
    (
        "MistralForCausalLM",
        "Mistral-Nemo",
        {
            "model_type": "mistral",
            "vocab_size": 131072,
            "hidden_size": 5120,
            "head_dim": 128,
            "intermediate_size": 14336,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "sliding_window": None,
        },
    ),
    (
        "Qwen2ForCausalLM",
        "Qwen2-7B",
        {
            "model_type": "qwen2",
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
    ),
    (
        "Gemma2ForCausalLM",
        "gemma-2-9b",
        {
            "model_type": "gemma2",
            "vocab_size": 256000,
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
    ),
    (
        "MambaForCausalLM",
        "mamba-2.8b",
        {
            "model_type": "mamba",
            "vocab_size": 50280,
            "hidden_size": 2560,
            "intermediate_size": 5120,
            "num_hidden_layers": 64,
            "state_size": 16,
            "time_step_rank": 160,
        },
    ),
    (
        "LlavaForConditionalGeneration",
        "llava-1.5-7b",
        {
            "model_type": "llava",
            "image_token_index": 32000,
            "text_config": {
                "architectures": ["LlamaForCausalLM"],
                "max_position_embeddings": 4096,
                "model_type": "llama",
                "rms_norm_eps": 1e-05,
                "vocab_size": 32064,
            },
            "vision_config": CLIP_336,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
    ),
    (
        "LlavaForConditionalGeneration",
        "pixtral-12b",
        {
            "model_type": "llava",
            "image_token_index": 10,
            "text_config": {
                "head_dim": 128,
                "hidden_size": 5120,
                "intermediate_size": 14336,
                "max_position_embeddings": 1024000,
                "model_type": "mistral",
                "num_hidden_layers": 40,
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-05,
                "rope_theta": 1000000000.0,
                "sliding_window": None,
                "vocab_size": 131072,
            },
            "vision_config": {
                "head_dim": 64,
                "hidden_act": "silu",
                "image_size": 1024,
                "model_type": "pixtral",
                "patch_size": 16,
                "rope_theta": 10000.0,
            },
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
    ),
    (
        "Qwen2VLForConditionalGeneration",
        "Qwen2-VL-2B",
        {
            "model_type": "qwen2_vl",
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "tie_word_embeddings": True,
            "sliding_window": 32768,
            "use_sliding_window": False,
            "vision_config": {
                "depth": 32,
                "embed_dim": 1280,
                "mlp_ratio": 4,
                "num_heads": 16,
                "in_chans": 3,
                "hidden_size": 1536,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "spatial_patch_size": 14,
                "temporal_patch_size": 2,
            },
        },
    ),
    (
        "PaliGemmaForConditionalGeneration",
        "paligemma-3b-224",
        {
            "model_type": "paligemma",
            "image_token_index": 257152,
            "hidden_size": 2048,
            "projection_dim": 2048,
            "text_config": {
                "hidden_size": 2048,
                "intermediate_size": 16384,
                "model_type": "gemma",
                "num_attention_heads": 8,
                "num_hidden_layers": 18,
                "num_image_tokens": 256,
                "num_key_value_heads": 1,
                "vocab_size": 257216,
            },
            "vision_config": SO400M,
        },
    ),
    (
        "MllamaForConditionalGeneration",
        "Llama-3.2-11B-Vision",
        {
            "model_type": "mllama",
            "image_token_index": 128256,
            "text_config": {
                "model_type": "mllama_text_model",
                "vocab_size": 128256,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 40,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-05,
                "rope_theta": 500000.0,
            },
            "vision_config": {"model_type": "mllama_vision_model", "image_size": 448},
        },
    ),
]
#: What a reference's tower has and nothing reads: a norm of the vector of the whole picture.
UNREAD = {"llava-1.5-7b": "post_layernorm"}


def described(name: str, config: dict[str, Any]) -> model.Described:
    architecture = registry.find(name).load()
    return model.describe(architecture, ConfigFile(json.loads(json.dumps(config)), Path("config.json")))


@pytest.mark.parametrize(("name", "title", "config"), PUBLISHED, ids=[title for _, title, _ in PUBLISHED])
def test_the_tree_has_as_many_numbers_as_the_reference(name: str, title: str, config: dict[str, Any]) -> None:
    kind = getattr(transformers, name)
    with torch.device("meta"):
        reference = kind(kind.config_class(**json.loads(json.dumps(config))))
    unread = UNREAD.get(title, "nothing")
    # By identity: a tied head is one tensor under two names.
    wanted = {id(p): p.numel() for path, p in reference.named_parameters() if unread not in path}
    assert model.num_parameters(described(name, config).tree) == sum(wanted.values())


def test_a_null_of_an_inner_configuration_is_no_default() -> None:
    """Pixtral's text has no window, which its class would have."""
    (config,) = (config for _, title, config in PUBLISHED if title == "pixtral-12b")
    tree = described("LlavaForConditionalGeneration", config).tree
    assert {block.window for block in tree.modules() if isinstance(block, Attention)} == {None}
    without = {key: value for key, value in config["text_config"].items() if key != "sliding_window"}
    tree = described("LlavaForConditionalGeneration", {**config, "text_config": without}).tree
    assert {block.window for block in tree.modules() if isinstance(block, Attention)} == {4096}
