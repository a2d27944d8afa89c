"""Whole models with random weights: decode and its share of the limits, adapters, and how long the GPU stands idle."""

import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bestiary import LLM, SamplingParams
from bestiary.checkpoint import ConfigFile
from bestiary.config import EngineConfig
from bestiary.parallel import Mesh
from bestiary.planner import Shapes
from gpu.device import Device
from gpu.rows import Row

__all__ = ["Shape", "lora_rows", "rows"]

_LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
_TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
_TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}

#: Steps under the profiler: the first launch of a graph there takes it most of a millisecond, which no other one does.
_UNSTEADY, _PROFILED = 4, 40


class Shape:
    """A model of a published shape, in a folder that holds its config.json alone."""

    def __init__(self, device: Device, folder: Path) -> None:
        self.device, self.folder = device, folder
        self.config = _LLAMA_8B | (_TINY if device.is_tiny else {})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        self.prompt, self.new = (8, 12) if device.is_tiny else (256, 128)
        self.warm_steps, self.steps = (2, 3) if device.is_tiny else (8, 64)

    def load(self, batch: int, **settings: Any) -> LLM:
        """Ready to decode, without a prefix cache."""
        room = {"num_gpu_blocks_override": batch * 8} if self.device.is_tiny else {}
        return LLM(
            str(self.folder),
            load_format="dummy",
            dtype="bfloat16",
            device=str(self.device.kind),
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=self.prompt + self.new + 16,
            max_num_seqs=batch,
            max_num_batched_tokens=8192,
            **room,
            **settings,
        )

    def prompts(self, batch: int) -> list[list[int]]:
        """Of random tokens, always the same."""
        draw = random.Random(batch)
        return [[draw.randrange(self.config["vocab_size"]) for _ in range(self.prompt)] for _ in range(batch)]

    def begin(self, llm: LLM, batch: int, lora: Sequence[str] | None = None) -> list[str]:
        """Start as many answers, and go on until all of them are being written and steps are recorded; their ids."""
        params = SamplingParams(temperature=0, max_tokens=self.new, ignore_eos=True, detokenize=False)
        names = [f"request-{number}" for number in range(batch)]
        for number, (name, prompt) in enumerate(zip(names, self.prompts(batch), strict=True)):
            llm.engine.add_request(name, prompt, params, lora=None if lora is None else lora[number])
        begun: set[str] = set()
        while len(begun) < batch:
            begun.update(output.request_id for output in llm.engine.step())
        for _ in range(self.warm_steps):
            llm.engine.step()
        return names

    def rate(self, llm: LLM, batch: int, lora: Sequence[str] | None = None) -> float:
        """Tokens a second of steady decode."""
        names = self.begin(llm, batch, lora)
        begin = time.perf_counter()
        count = sum(len(llm.engine.step()) for _ in range(self.steps))
        seconds = time.perf_counter() - begin
        llm.engine.abort(names)
        assert count == batch * self.steps, "not every step wrote a token of every answer"
        return count / seconds

    def throughput(self, llm: LLM, batch: int) -> float:
        """New tokens a second of whole answers, the reading of their prompts included: the better of two."""
        params = SamplingParams(temperature=0, max_tokens=self.new, ignore_eos=True, detokenize=False)
        found = []
        for _ in range(2):
            begin = time.perf_counter()
            llm.generate(self.prompts(batch), params, use_tqdm=False)
            found.append(batch * self.new / (time.perf_counter() - begin))
        return max(found)

    def step_bytes(self, batch: int) -> float:
        """What a decode step reads, half of the answer being there."""
        shapes = Shapes(ConfigFile.load(self.folder), EngineConfig(model=str(self.folder), dtype="bfloat16"))
        rank = shapes.rank(Mesh())
        return rank.weights_read(batch) + batch * rank.cache_read(self.prompt + self.warm_steps + self.steps // 2)


def rows(shape: Shape, throughput: dict[int, float]) -> Iterator[Row]:
    """Decode at several batch sizes, and the GPU's idle time. Whole answers' rates are left for the peer's turn."""
    batches = (1, 3) if shape.device.is_tiny else (1, 8, 32, 64, 128)
    llm = shape.load(max(batches))
    for batch in batches:
        rate = shape.rate(llm, batch)
        share = rate / batch * shape.step_bytes(batch) / shape.device.bandwidth
        goal = 0.65 if batch == 1 else None
        yield Row(f"8B decode, batch {batch}", rate, "tokens/s", share, "copy", goal)
    if shape.device.kind.type == "cuda":
        for batch in (1, 32, 128):
            yield _idle(shape, llm, batch)
    for batch in (1, 32, 128):
        if batch <= max(batches):
            throughput[batch] = shape.throughput(llm, batch)
            yield Row(f"8B answers, batch {batch}", throughput[batch], "tokens/s")
    llm.close()


def _idle(shape: Shape, llm: LLM, batch: int) -> Row:
    """Share of a steady stretch of decode in which no kernel ran."""
    from torch.profiler import ProfilerActivity, profile

    names = shape.begin(llm, batch)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(_UNSTEADY + _PROFILED):
            llm.engine.step()
        torch.cuda.synchronize()
    llm.engine.abort(names)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiled.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    spans = spans[len(spans) * _UNSTEADY // (_UNSTEADY + _PROFILED) :]  # all steps launch as much
    busy, at = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(at, start))
        at = max(at, end)
    idle = 1 - busy / (at - spans[0][0])
    return Row(f"8B decode, batch {batch}, GPU idle", idle * 100, "%", idle, "the time", 0.03, is_ceiling=True)


def lora_rows(shape: Shape) -> Iterator[Row]:
    """Eight adapters in one batch, beside none, and adapters that are loaded and not used."""
    batch = 3 if shape.device.is_tiny else 32
    llm = shape.load(batch, max_loras=8)
    base = shape.rate(llm, batch)
    for number in range(8):
        llm.load_lora(f"a{number}", _adapter(shape, number))
    unused = shape.rate(llm, batch)
    yield Row(f"8B decode, batch {batch}, adapters not used", unused, "tokens/s", unused / base, "none", 0.99)
    used = shape.rate(llm, batch, [f"a{number % 8}" for number in range(batch)])
    yield Row(f"8B decode, batch {batch}, 8 adapters (q, v, rank 16)", used, "tokens/s", used / base, "none", 0.9)
    llm.close()


def _adapter(shape: Shape, seed: int) -> Path:
    config, draw = shape.config, torch.Generator().manual_seed(seed)
    width, head = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    outputs = {"q_proj": width, "v_proj": config["num_key_value_heads"] * head}
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, rows_ in outputs.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(16, width, generator=draw).bfloat16()
            tensors[f"{stem}.lora_B.weight"] = (torch.randn(rows_, 16, generator=draw) * 1e-3).bfloat16()
    folder = shape.folder / f"adapter-{seed}"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16, "lora_alpha": 16}))
    return folder
