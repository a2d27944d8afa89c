"""transformers' continuous batching on the same device, the same shape and the same prompts."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from gpu.rows import Row
from gpu.serving import Shape

__all__ = ["rows"]


def rows(shape: Shape, ours: Mapping[int, float]) -> Iterator[Row]:
    """The peer's whole answers at the batch sizes of ours, the better of two, and how many times ours is that."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    values = {name: value for name, value in shape.config.items() if name not in ("architectures", "dtype")}
    with torch.device(shape.device.kind):
        config = LlamaConfig(**values, attn_implementation="sdpa")
        config.pad_token_id = 0
        model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    wanted = GenerationConfig(max_new_tokens=shape.new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    for batch, own in ours.items():
        found = []
        for _ in range(2):  # the first one captures graphs
            begin = time.perf_counter()
            answers = model.generate_batch(
                inputs=shape.prompts(batch), generation_config=wanted, progress_bar=False, persistent_manager=True
            )
            found.append(batch * shape.new / (time.perf_counter() - begin))
            assert all(len(answer.generated_tokens) == shape.new for answer in answers.values())
        model.destroy_cached_continuous_batching_manager()
        yield Row(f"transformers' continuous batching, batch {batch}", max(found), "tokens/s")
        yield Row(f"ours against it, batch {batch}", own / max(found), "x", goal=1.5)
