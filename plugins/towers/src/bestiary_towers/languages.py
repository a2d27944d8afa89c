"""The language models beside which towers stand: what serves each, and what their part of config.json leaves out."""

from collections.abc import Mapping
from typing import Any

from bestiary.checkpoint import ConfigFile
from bestiary.model import Described, language_model

__all__ = ["describe", "read"]

_SERVED = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
#: Published configurations hold what differs from their class in transformers; this is how those classes begin.
_LEFT_OUT: Mapping[str, Mapping[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "intermediate_size": 14336, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {**_LLAMA, "vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768},
}


def read(section: ConfigFile, *kinds: str, tied: bool | None = None) -> ConfigFile:
    """The part of config.json on a language model of one of these kinds, whole; the first where it says no kind.

    `tied` is what the whole model's part says of the head: where it does, that holds. Raises ConfigUnsupported for
    another kind.
    """
    kind = section.expect("model_type", *kinds, default=kinds[0])
    whole = section.filled({"model_type": kind, **_LEFT_OUT.get(kind, {})})
    if tied is None:
        return whole
    return ConfigFile({**whole.values, "tie_word_embeddings": tied}, section.path, "text_config.")


def describe(section: ConfigFile) -> Described:
    """The model that such a part describes, by the plugin for it. Raises PluginNotInstalled where there is none."""
    return language_model(section, _SERVED)
