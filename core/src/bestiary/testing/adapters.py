"""Adapters for proofs: random ones in PEFT's form for a tiny checkpoint, and the checkpoint that they are merged into.

What an adapter stands beside are the modules of the checkpoint itself, by their published names.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bestiary import model
from bestiary.architecture import Architecture
from bestiary.blocks import Adaptable, Embedding, Leaf
from bestiary.checkpoint import ConfigFile

__all__ = ["Matrix", "Pairs", "matrices", "merged", "random_pairs", "save"]

#: What an adapter adds, beside weights of about 1.
_SIZE = 0.25

Pairs = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Matrix:
    """A matrix of the checkpoint beside which an adapter may stand."""

    module: str
    #: Output and input numbers, whatever way round the file has them.
    rows: int
    columns: int
    is_transposed: bool
    #: It is a table, whose rows are looked up.
    is_table: bool = False


def matrices(architecture: Architecture, folder: Path, shapes: Mapping[str, Sequence[int]]) -> list[Matrix]:
    """Those of a tiny checkpoint, in the order of its names."""
    tree, names, _ = model.describe(architecture, ConfigFile.load(folder))
    leaves: dict[str, Leaf] = dict(model.leaves(tree))
    found = []
    for name, shape in sorted(shapes.items()):
        target = names.find(name)
        if not name.endswith(".weight") or len(shape) != 2 or target is None or target.path is None:
            continue
        leaf = leaves.get(target.path)
        if isinstance(leaf, Embedding) and target.path == "embed" and not tree.head.tied:
            found.append(Matrix(name.removesuffix(".weight"), leaf.width, leaf.vocabulary, True, True))
        if leaf is tree.head and tree.head.tied:
            continue  # the second copy of a tied table is not read
        if isinstance(leaf, Adaptable) and leaf.takes_adapters and not target.stacked:
            rows = sum(leaf.parts[part] for part in target.parts(leaf))
            found.append(Matrix(name.removesuffix(".weight"), rows, leaf.inputs, target.view is not None))
    return found


def random_pairs(found: Sequence[Matrix], rank: int, seed: int) -> Pairs:
    """A and B for each, large enough to be seen."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {m.module: _drawn(m, draw(rank, m.columns), draw(m.rows, rank)) for m in found}


def _drawn(matrix: Matrix, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    width = 1 if matrix.is_table else matrix.columns
    return down * width**-0.5, up * (_SIZE * up.shape[1] ** -0.5)


def save(folder: Path, pairs: Pairs, tables: Collection[str], rank: int, alpha: float, **config: object) -> Path:
    """A folder as PEFT saves it; `tables` are the modules that are embeddings."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (down, up) in pairs.items():
        kind, end = ("lora_embedding_", "") if module in tables else ("lora_", ".weight")
        tensors[f"base_model.model.{module}.{kind}A{end}"] = down
        tensors[f"base_model.model.{module}.{kind}B{end}"] = up
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def merged(pairs: Pairs, found: Sequence[Matrix], scale: float) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """What makes of a checkpoint's tensors those with the adapter in them."""
    transposed = {m.module for m in found if m.is_transposed}

    def rewrite(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        changed = dict(tensors)
        for module, (down, up) in pairs.items():
            added = (up @ down) * scale
            changed[f"{module}.weight"] = changed[f"{module}.weight"] + (added.T if module in transposed else added)
        return changed

    return rewrite
