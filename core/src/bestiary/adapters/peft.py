"""An adapter as PEFT saves it: adapter_config.json and one safetensors file. Knows no model.

What would need more than a product of two matrices beside each module is refused by name.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bestiary.checkpoint import Checkpoint
from bestiary.checkpoint.jsonfile import read_object, shown
from bestiary.errors import AdapterError, CheckpointError

__all__ = ["CONFIG", "TENSORS", "Adapter", "Pair", "adapter_folder", "read"]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_CONFIG_LIMIT_BYTES = 1_000_000
_MOST_RANK = 4096

_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.(?:lora_(?P<kind>[AB])(?:\.default)?\.weight"
    r"|lora_embedding_(?P<table>[AB])(?:\.default)?)"
)
#: What an adapter may ask for and is not served, each with the reason.
_REFUSED = {
    "use_dora": "DoRA also rescales the weights that it stands beside",
    "modules_to_save": "it replaces whole modules, which requests without it share",
    "layer_replication": "it makes another model of the layers",
    "trainable_token_indices": "it replaces rows of a table that requests without it share",
    "target_parameters": "it stands beside tensors that are no module's weight",
    "alora_invocation_tokens": "it begins to hold in the middle of a prompt",
    "use_qalora": "it pools its inputs",
    "lora_bias": "it adds a bias",
    "megatron_config": "its matrices are laid out for Megatron",
}
#: Initialisations that changed the base model's weights too.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Pair:
    """What stands beside one module."""

    #: A, [rank, inputs].
    down: Tensor
    #: B times the scale, [outputs, rank] float32.
    up: Tensor


@dataclass(frozen=True)
class Adapter:
    """An adapter's matrices by module, in the names of the model that it was trained on."""

    folder: Path
    pairs: Mapping[str, Pair]
    #: The largest of any module.
    rank: int
    #: Of all matrices and scales: two adapters with one digest do the same.
    digest: bytes


def adapter_folder(folder: Path, root: str | None) -> Path:
    """The folder, resolved. Raises AdapterError where it, or a file of it, lies outside `root`, where that is set."""
    found = folder.expanduser().resolve()
    if root is not None:
        base = Path(root).expanduser().resolve()
        for path in (found, *((found / name).resolve() for name in (CONFIG, TENSORS))):
            if not path.is_relative_to(base):
                raise AdapterError(f"{folder} is not below allowed_lora_path={root}")
    if not found.is_dir():
        raise AdapterError(f"{folder} is not a folder; give the folder that holds {CONFIG} and {TENSORS}")
    return found


def read(folder: Path, most_rank: int) -> Adapter:
    """Read a folder. Raises AdapterError, naming file and key or tensor, for what is malformed or not served."""
    try:
        config = read_object(folder / CONFIG, _CONFIG_LIMIT_BYTES)
        _check(config, folder / CONFIG)
        with Checkpoint.single(folder / TENSORS) as checkpoint:
            matrices = _matrices(checkpoint)
            pairs = {module: _pair(module, found, config, folder) for module, found in matrices.items()}
            digest = _digest(pairs)
    except CheckpointError as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"the adapter in {folder} cannot be read: {error}") from error
    if not pairs:
        raise AdapterError(f"{folder / TENSORS} holds no adapter: no tensor is called ...lora_A.weight")
    rank = max(pair.down.shape[0] for pair in pairs.values())
    if rank > most_rank:
        raise AdapterError(f"the adapter in {folder} has rank {rank}: load the model with max_lora_rank={rank}")
    return Adapter(folder, pairs, rank, digest)


def _check(config: Mapping[str, Any], file: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{file}: peft_type is {shown(config.get('peft_type'))}; only LORA is served")
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise AdapterError(f"{file}: {key}={shown(config[key])} is not served: {reason}")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{file}: bias={shown(config['bias'])} is not served: it changes the base model's biases")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise AdapterError(
            f"{file}: init_lora_weights={shown(start)} changed the base model; save it converted to plain LoRA"
        )
    rank = config.get("r")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= _MOST_RANK:
        raise AdapterError(f"{file}: r={shown(rank)}: it must be a whole number from 1 to {_MOST_RANK}")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(re.fullmatch(r"\^?[\w.]+", name) for name in patterns):
            raise AdapterError(f"{file}: {key}={shown(patterns)}: its keys must be names of modules, or their ends")


def _matrices(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """By module its A and B."""
    found: dict[str, dict[str, Tensor]] = {}
    for name in checkpoint:
        match = _NAME.fullmatch(name)
        if match is None:
            reason = _REFUSED["use_dora"] if "magnitude" in name else "only lora_A and lora_B are served"
            raise AdapterError(f"{checkpoint.file(name)}: tensor {shown(name)}: {reason}")
        tensor = checkpoint.tensor(name)
        if not tensor.dtype.is_floating_point or tensor.ndim != 2 or not bool(torch.isfinite(tensor.float()).all()):
            raise AdapterError(
                f"{checkpoint.file(name)}: {shown(name)} is {checkpoint.dtype(name)} {list(tensor.shape)}; "
                "it must be a matrix of finite numbers"
            )
        found.setdefault(match["module"], {})[match["kind"] or match["table"]] = tensor
    return found


def _pair(module: str, found: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> Pair:
    where = f"{folder / TENSORS}: {module}"
    if lacking := {"A", "B"} - found.keys():
        raise AdapterError(f"{where} has no lora_{lacking.pop()}")
    down, up = found["A"], found["B"]
    rank = _pattern(config, "rank_pattern", module, config["r"])
    if not down.shape[0] == up.shape[1] == rank:
        raise AdapterError(
            f"{where} has A {list(down.shape)} and B {list(up.shape)}, and the rank is to be {shown(rank)} ({CONFIG})"
        )
    alpha = _pattern(config, "alpha_pattern", module, config.get("lora_alpha", 8))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(f"{folder / CONFIG}: lora_alpha={shown(alpha)}: it must be a finite number")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Pair(down.clone(), up.float() * scale)


def _pattern(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """What a pattern says of a module: its key is the module's name, or the end of it."""
    for name, value in (config.get(key) or {}).items():
        if module == name.removeprefix("^") or (not name.startswith("^") and module.endswith(f".{name}")):
            return value
    return default


def _digest(pairs: Mapping[str, Pair]) -> bytes:
    hasher = sha256(b"lora")
    for module in sorted(pairs):
        for tensor in (pairs[module].down, pairs[module].up):
            hasher.update(f"\0{module}\0{tensor.dtype}{tuple(tensor.shape)}\0".encode(errors="surrogatepass"))
            hasher.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.digest()
