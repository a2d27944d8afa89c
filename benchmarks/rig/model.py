"""A checkpoint as the floor sees it: bytes to read, operations to do. It reads headers and config.json, no weights."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True)
class Model:
    """A folder of a Llama-shaped checkpoint in bf16."""

    folder: Path
    config: dict[str, Any]
    weight_bytes: int
    """Everything a step reads: all weights once, but of an untied input table (one row a token)."""
    stored_bytes: int
    """Everything that is stored."""

    @staticmethod
    def read(folder: Path) -> "Model":
        """Look at a Hugging Face folder."""
        config = json.loads((folder / "config.json").read_text())
        sizes = _tensor_bytes(folder)
        table = 0 if "lm_head.weight" not in sizes else sizes["model.embed_tokens.weight"]
        stored = sum(sizes.values())
        return Model(folder.resolve(), config, stored - table, stored)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers, in bf16."""
        heads: int = self.config["num_attention_heads"]
        kv_heads: int = self.config.get("num_key_value_heads") or heads
        head_dim: int = self.config.get("head_dim") or self.config["hidden_size"] // heads
        layers: int = self.config["num_hidden_layers"]
        return 2 * layers * kv_heads * head_dim * 2

    def decode_step_bytes(self, batch: int, context: float, bits: int) -> float:
        """What one decode step must read: the weights once, of so many bits, and all sequences' keys and values."""
        return self.weight_bytes * bits / 16 + batch * context * self.kv_bytes_per_token

    def prefill_flops(self, length: int) -> float:
        """Operations for one prompt: the layers' matrices for every token, causal attention, the head once."""
        config = self.config
        heads: int = config["num_attention_heads"]
        head_dim: int = config.get("head_dim") or config["hidden_size"] // heads
        layers: int = config["num_hidden_layers"]
        head: int = config["hidden_size"] * config["vocab_size"]
        attention = 4 * layers * heads * head_dim * length**2 / 2
        return 2 * (self.weight_bytes / 2 - head) * length + attention + 2 * head

    def prompts(self, num: int, length: int) -> list[list[int]]:
        """The same different prompts each time: random token ids, past the special ones at the start."""
        source = random.Random(0)
        vocab = self.config["vocab_size"]
        return [[source.randrange(min(1000, vocab // 2), vocab) for _ in range(length)] for _ in range(num)]


def _tensor_bytes(folder: Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in _BYTES:
                raise SystemExit(f"{path}: {name} is {entry['dtype']}; the floor is worked out for {', '.join(_BYTES)}")
            start, end = entry["data_offsets"]
            sizes[name] = end - start
    if not sizes:
        raise SystemExit(f"{folder} has no safetensors")
    return sizes
