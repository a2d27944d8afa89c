"""Published shapes on known devices: what they take is arithmetic that everybody can do again."""

import json
from pathlib import Path
from typing import Any

import pytest

from bestiary import model
from bestiary.checkpoint import ConfigFile
from bestiary.config import EngineConfig
from bestiary.errors import SettingError
from bestiary.parallel import Mesh
from bestiary.planner import Shapes, device

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}


def llama(width: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    return {**LLAMA, **sizes, "num_attention_heads": heads}


PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": llama(4096, 14336, 32, 32),
    "Llama-3.1-70B": llama(8192, 28672, 80, 64),
    "Llama-3.1-405B": llama(16384, 53248, 126, 128),
    "Mixtral-8x7B": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "torch_dtype": "bfloat16",
    },
    "BLOOM-176B": {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "vocab_size": 250880,
        "n_embed": 14336,
        "n_layer": 70,
        "num_attention_heads": 112,
        "torch_dtype": "bfloat16",
    },
    "DeepSeek-V2": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 2,
        "n_routed_experts": 160,
        "routed_scaling_factor": 16.0,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "topk_method": "group_limited_greedy",
        "n_group": 8,
        "topk_group": 3,
        "num_experts_per_tok": 6,
        "moe_layer_freq": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "max_position_embeddings": 163840,
        "torch_dtype": "bfloat16",
    },
}
#: Parameters in billions, as published.
BILLIONS = {
    "Llama-3.1-8B": 8.03,
    "Llama-3.1-70B": 70.6,
    "Llama-3.1-405B": 405.9,
    "Mixtral-8x7B": 46.7,
    "BLOOM-176B": 176.2,
    "DeepSeek-V2": 235.7,
}


def shapes(name: str) -> Shapes:
    values = json.loads(json.dumps(PUBLISHED[name]))
    return Shapes(ConfigFile(values, Path("config.json")), EngineConfig(model=name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_published_number_of_parameters(name: str) -> None:
    assert model.num_parameters(shapes(name).tree) / 1e9 == pytest.approx(BILLIONS[name], rel=0.002)


@pytest.mark.parametrize(("shards", "stages"), [(8, 1), (8, 2), (2, 4)])
@pytest.mark.parametrize("name", PUBLISHED)
def test_ranks_together_hold_the_model_and_what_is_replicated(name: str, shards: int, stages: int) -> None:
    planned = shapes(name)
    held = [planned.rank(Mesh.at(rank, stages, shards, Mesh().link)).weight_bytes for rank in range(shards * stages)]
    assert planned.weight_bytes <= sum(held) < planned.weight_bytes * 1.09
    assert max(held) < planned.weight_bytes / (shards * stages) * 1.3


def test_a_token_takes_what_is_published() -> None:
    assert shapes("Llama-3.1-8B").rank(Mesh()).token_bytes == 2 * 8 * 128 * 2 * 32 == 131072
    latent = (512 + 64) * 2 * 60
    for shard in range(8):  # every shard keeps the latent rows, which all heads read
        assert shapes("DeepSeek-V2").rank(Mesh(shard=shard, shards=8)).token_bytes == latent


def test_405b_does_not_fit_eight_h100_and_the_smallest_split_is_named() -> None:
    planned, on = shapes("Llama-3.1-405B"), device("h100")
    assert not planned.plan(on, 8, 1, 8192).fits(1)
    split = planned.smallest_split(on, 8192)
    assert split is not None
    tensor, pipeline = split
    # 812 GB of weights in devices of which 77 GB are used: 11 hold them, and 12 are the first that share evenly.
    assert tensor * pipeline == 12
    assert planned.plan(on, tensor, pipeline, 8192).fits(1)


def test_70b_on_one_h200_leaves_little() -> None:
    planned, on = shapes("Llama-3.1-70B"), device("h200")
    usable = int(on.memory_bytes * 0.9)
    assert planned.plan(on, 1, 1, 8192).fits(1) == (planned.weight_bytes + 8192 * 327680 <= usable)
    assert planned.plan(on, 2, 1, 8192).largest_batch > 20


def test_a_split_that_cannot_be_names_the_choices() -> None:
    with pytest.raises(SettingError, match=r"tensor_parallel_size=3.*choose one of 1, 2, 4, 8"):
        shapes("Llama-3.1-8B").plan(device("h200"), 3, 1, 8192)


def test_the_latent_cache_makes_long_contexts_cheap() -> None:
    """DeepSeek-V2's point: 128k tokens of it take less than 32k of a 70B Llama."""
    long = shapes("DeepSeek-V2").rank(Mesh()).cache_held(131072, 2048, 16)
    assert long < shapes("Llama-3.1-70B").rank(Mesh()).cache_held(32768, 2048, 16)
