"""A complete checkpoint of random weights, small enough for a test: config.json, safetensors, a tokenizer, a template.

It has the layout and the tensor names that most decoders are published with. Which architecture it claims to be is
the caller's to say; nothing here knows one.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

__all__ = ["tiny_checkpoint"]

_END, _TURN, _TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_TEXT = (
    "The griffin has the body of a lion, the head and wings of an eagle, and sleeps on gold.\n"
    "Who wakes the basilisk must not look at it: its glance kills, and so does its breath.\n"
    "Ein Einhorn trinkt am Bach; die Sirene singt für Schiffer, die keine Ohren haben. 1, 2, 3!\n"
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_checkpoint(
    folder: Path,
    architecture: str,
    *,
    vocab: int = 384,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    context: int = 2048,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    chat: bool = True,
    ends: bool = True,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a pre-norm decoder with grouped-query attention and a gated MLP into `folder`, and return it.

    The same arguments write the same model. `chat=False` leaves the chat template out, `ends=False` the end token, so
    that an answer stops only at its limit. `config` are further keys of config.json, or other values for those here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(vocab)
    weights = _weights(tokenizer.get_vocab_size(), hidden, layers, heads, kv_heads, tied, seed)
    save_file({name: tensor.to(dtype) for name, tensor in weights.items()}, folder / "model.safetensors")
    tokenizer.save(str(folder / "tokenizer.json"))
    end = {"eos_token_id": tokenizer.token_to_id(_TURN_END)} if ends else {}
    _write(
        folder / "config.json",
        {
            "architectures": [architecture],
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": tied,
            "torch_dtype": str(dtype).removeprefix("torch."),
            "vocab_size": tokenizer.get_vocab_size(),
            **end,
            **config,
        },
    )
    _write(folder / "tokenizer_config.json", {"eos_token": _TURN_END} if ends else {})
    if chat:
        (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    return folder


def _tokenizer(vocab: int) -> Tokenizer:
    """Byte-level BPE, trained on a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[AddedToken(text, special=True) for text in (_END, _TURN, _TURN_END)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT.splitlines(), trainer)
    return tokenizer


def _weights(
    vocab: int, hidden: int, layers: int, heads: int, kv_heads: int, tied: bool, seed: int
) -> dict[str, Tensor]:
    generator, head_dim = torch.Generator().manual_seed(seed), hidden // heads

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(columns**-0.5)

    def norm() -> Tensor:
        return 1 + 0.1 * torch.randn(hidden, generator=generator)

    found = {"model.embed_tokens.weight": torch.randn(vocab, hidden, generator=generator)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        found |= {
            f"{at}input_layernorm.weight": norm(),
            f"{at}self_attn.q_proj.weight": matrix(heads * head_dim, hidden),
            f"{at}self_attn.k_proj.weight": matrix(kv_heads * head_dim, hidden),
            f"{at}self_attn.v_proj.weight": matrix(kv_heads * head_dim, hidden),
            f"{at}self_attn.o_proj.weight": matrix(hidden, heads * head_dim),
            f"{at}post_attention_layernorm.weight": norm(),
            f"{at}mlp.gate_proj.weight": matrix(2 * hidden, hidden),
            f"{at}mlp.up_proj.weight": matrix(2 * hidden, hidden),
            f"{at}mlp.down_proj.weight": matrix(hidden, 2 * hidden),
        }
    found["model.norm.weight"] = norm()
    return found if tied else {**found, "lm_head.weight": matrix(vocab, hidden)}


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2), encoding="utf-8")
