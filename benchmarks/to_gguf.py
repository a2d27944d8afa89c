"""Write a bf16 GGUF of a Llama checkpoint for llama.cpp: to_gguf.py FOLDER OUT. Runs in the llamacpp environment."""

import argparse
import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def main() -> None:
    """Read the folder, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    config = json.loads((args.folder / "config.json").read_text())
    if config["architectures"] != ["LlamaForCausalLM"]:
        raise SystemExit(
            f"{args.folder}/config.json: only LlamaForCausalLM can be written, not {config['architectures']}"
        )
    writer = gguf.GGUFWriter(args.out, "llama")
    _add_config(writer, config)
    _add_vocab(writer, args.folder, config)
    for name, array in _tensors(args.folder):
        _add_tensor(writer, name, array, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _heads(config: dict[str, Any]) -> tuple[int, int]:
    return config["num_attention_heads"], config.get("num_key_value_heads", config["num_attention_heads"])


def _add_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads, kv_heads = _heads(config)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise SystemExit(f"config.json: rope type {rope['rope_type']} cannot be written")
    writer.add_name("benchmark")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(config.get("rope_theta") or rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _add_vocab(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    """The tokenizer's strings and merges; made-up strings where it has none. Only token ids are ever evaluated."""
    size = config["vocab_size"]
    tokens, merges = [f"<unused{i}>" for i in range(size)], ["a b"]
    kinds = [int(gguf.TokenType.NORMAL)] * size
    if (folder / "tokenizer.json").exists():
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        for text, i in tokenizer["model"]["vocab"].items():
            tokens[i] = text
        for added in tokenizer["added_tokens"]:
            tokens[added["id"]], kinds[added["id"]] = added["content"], int(gguf.TokenType.CONTROL)
        merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"].get("merges", merges)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if size == 49152 else "gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)


def _tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the folder's safetensors, bf16 bit patterns as uint16 (numpy has no bf16)."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise SystemExit(f"{path}: {name} is {entry['dtype']}, not BF16")
            start, end = entry["data_offsets"]
            raw = np.frombuffer(data, np.uint16, (end - start) // 2, offset=8 + size + start)
            yield name, raw.reshape(entry["shape"])


def _add_tensor(writer: gguf.GGUFWriter, name: str, array: np.ndarray, config: dict[str, Any]) -> None:
    stem = name.removesuffix(".weight")
    layer = ""
    if stem.startswith("model.layers."):
        _, _, index, stem = stem.split(".", 3)
        layer = f"blk.{index}."
    if stem == "lm_head" and config.get("tie_word_embeddings"):
        return
    if array.ndim == 1:  # llama.cpp keeps norms in float32
        writer.add_tensor(f"{layer}{NAMES[stem]}.weight", (array.astype(np.uint32) << 16).view(np.float32))
        return
    if stem in ("self_attn.q_proj", "self_attn.k_proj"):
        # Its rotary embedding turns neighbouring pairs, the checkpoint's the two halves of a head.
        heads = _heads(config)[stem.endswith("k_proj")]
        array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
    raw = np.ascontiguousarray(array).view(np.uint8)
    writer.add_tensor(f"{layer}{NAMES[stem]}.weight", raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


if __name__ == "__main__":
    main()
