"""A GGUF file's parts written as a folder in Hugging Face's layout, whole or not at all. Knows no architecture."""

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from math import prod
from pathlib import Path
from typing import IO, Any

import torch

from bestiary.checkpoint.gguf.file import GGUFFile
from bestiary.checkpoint.gguf.tokenizer import special_tokens, tokenizer_json
from bestiary.errors import CheckpointError, CheckpointMalformed

__all__ = ["Stored", "write_folder"]

STALE_S = 3600  # a half-written folder untouched for this long belongs to an importer that was killed


def _as_stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class Stored:
    """Where one weight stands in the GGUF file, and how to bring its rows back into Hugging Face's order."""

    name: str
    restore: Callable[[torch.Tensor], torch.Tensor] = _as_stored  # keeps the shape


def write_folder(folder: Path, gguf: GGUFFile, config: Mapping[str, Any], weights: Mapping[str, Stored]) -> None:
    """Write `folder`: config.json, model.safetensors in bfloat16, tokenizer, chat template, generation_config.json.

    `config` is config.json without the token ids; `weights` maps the names in model.safetensors to tensors of the
    GGUF file. Everything is written beside `folder` under another name, then renamed: nobody ever sees half a folder.
    Where another process finished first, its folder stays. Raises CheckpointError where the disk does not take it.
    """
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        _remove_stale(folder)
        _write_parts(partial, gguf, config, weights)
        _publish(partial, folder)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {folder}: {error.strerror}; it takes {_size_bytes(gguf, weights) / 1e6:.0f} MB: "
            "make room, or set BESTIARY_CACHE to a folder on another disk"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _remove_stale(folder: Path) -> None:
    for partial in folder.parent.glob(f".{escape(folder.name)}.*"):
        with suppress(FileNotFoundError):  # its importer has just finished
            if time.time() - partial.stat().st_mtime > STALE_S:
                shutil.rmtree(partial, ignore_errors=True)


def _write_parts(folder: Path, gguf: GGUFFile, config: Mapping[str, Any], weights: Mapping[str, Stored]) -> None:
    ids = _token_ids(gguf)
    _write_text(folder / "config.json", _json({**config, **ids}))
    _write_text(folder / "generation_config.json", _json(ids))
    _write_text(folder / "tokenizer.json", tokenizer_json(gguf))
    _write_text(folder / "tokenizer_config.json", _json(_tokenizer_config(gguf, config)))
    template = gguf.get("tokenizer.chat_template", str, "")
    if template:
        _write_text(folder / "chat_template.jinja", template)
    with (folder / "model.safetensors").open("wb") as file:
        _write_safetensors(file, gguf, weights)
        _settle(file)


def _token_ids(gguf: GGUFFile) -> dict[str, int | list[int]]:
    """The ids that generation needs; several end a text where the end of a turn is another token."""
    ids: dict[str, int | list[int]] = {
        f"{mark}_token_id": i for mark, (i, _) in special_tokens(gguf).items() if mark != "unk"
    }
    turn_end = gguf.get("tokenizer.ggml.eot_token_id", int, -1)
    if turn_end >= 0 and ids.setdefault("eos_token_id", turn_end) != turn_end:
        ids["eos_token_id"] = [gguf.need("tokenizer.ggml.eos_token_id", int), turn_end]
    return ids


def _tokenizer_config(gguf: GGUFFile, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{f"{mark}_token": text for mark, (_, text) in special_tokens(gguf).items()},
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }


def _size_bytes(gguf: GGUFFile, weights: Mapping[str, Stored]) -> int:
    return sum(2 * prod(gguf.shape(stored.name)) for stored in weights.values())


def _write_safetensors(file: IO[bytes], gguf: GGUFFile, weights: Mapping[str, Stored]) -> None:
    """Write tensor after tensor, so that only one is in memory at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, stored in weights.items():
        shape = gguf.shape(stored.name)
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight, where a reader may map it
    file.write(len(text).to_bytes(8, "little") + text)
    for name, stored in weights.items():
        tensor = stored.restore(gguf.dequantised(stored.name))
        if tensor.shape != gguf.shape(stored.name):
            raise CheckpointMalformed(f"{gguf.path}: {stored.name!r} changed its shape on the way to {name!r}")
        file.write(tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().data)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _write_text(path: Path, text: str) -> None:
    with path.open("wb") as file:
        file.write(text.encode())
        _settle(file)


def _settle(file: IO[bytes]) -> None:
    """Wait until the disk has it: after a power cut, a renamed folder must not hold empty files."""
    file.flush()
    os.fsync(file.fileno())
