"""transformers' continuous batching on the same device, the same shape and the same prompts."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from gpu.rows import Row
from gpu.serving import Shape

__all__ = ["rows"]


def rows(shape: Shape, ours: Mapping[int, float]) -> Iterator[Row]:
    """The peer's rate at the batch sizes for which ours is known, and how many times ours is that."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    values = {name: value for name, value in shape.config.items() if name not in ("architectures", "dtype")}
    with torch.device(shape.device.kind):
        config = LlamaConfig(**values, attn_implementation="sdpa")
        config.pad_token_id = 0
        model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    for batch in sorted({min(ours), *(batch for batch in (32, 128) if batch in ours)}):
        seconds: dict[int, float] = {}
        for turn, count in enumerate((shape.new, 1, shape.new, 1, shape.new)):
            wanted = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0)
            begin = time.perf_counter()
            model.generate_batch(inputs=shape.prompts(batch), generation_config=wanted, progress_bar=False)
            shape.device.wait()
            took = time.perf_counter() - begin
            if turn:  # the first one compiles and captures
                seconds[count] = min(took, seconds.get(count, took))
        rate = batch * (shape.new - 1) / max(seconds[shape.new] - seconds[1], 1e-9)
        yield Row(f"transformers' continuous batching, batch {batch}", rate, "tokens/s")
        yield Row(f"ours against it, batch {batch}", ours[batch] / rate, "x", goal=1.5)
