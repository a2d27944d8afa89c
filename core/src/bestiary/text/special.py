"""What a checkpoint says about its special tokens, beside the vocabulary. Knows neither tokenizer nor template."""

from pathlib import Path
from typing import Any

from bestiary.checkpoint.jsonfile import read_object

__all__ = ["read_optional", "special_tokens", "tokenizer_config"]

_MAX_BYTES = 64 * 2**20


def read_optional(file: Path) -> dict[str, Any]:
    """Returns the JSON object in a file, or an empty one where there is no such file.

    Raises CheckpointMalformed for anything that is no JSON object.
    """
    return read_object(file, _MAX_BYTES) if file.exists() else {}


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """Returns `tokenizer_config.json` over `special_tokens_map.json`, which older checkpoints have beside it."""
    return read_optional(folder / "special_tokens_map.json") | read_optional(folder / "tokenizer_config.json")


def special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Returns the tokens that have a name (`bos_token`, `eos_token`, ...), by that name.

    A token stands there as its text or as an object with a `content`; a name without a token is left out.
    """
    found: dict[str, str] = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return found
