"""A tower as the engine makes one: from a file of a reference's weights, through core's own passes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bestiary.blocks import Leaf
from bestiary.blocks.leaf import Block
from bestiary.checkpoint import Checkpoint, ConfigFile, Names, fill

Build = Callable[..., Block]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Fill a described tower from weights that are saved under a prefix, then pack it and let it settle."""

    def built(tower: Block, names: Names, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Block:
        save_file({name: tensor.clone() for name, tensor in weights.items()}, tmp_path / "model.safetensors")
        at = "encoder.tower."  # where a model mounts it
        leaves = {at + path: module for path, module in tower.named_modules() if isinstance(module, Leaf)}
        for leaf in leaves.values():
            leaf.allocate(dtype, torch.device("cpu"))
        with Checkpoint.open(tmp_path) as checkpoint:
            fill(leaves, names.under("", at), checkpoint, elsewhere=lambda path: False)
        for leaf in leaves.values():
            leaf.pack()
        for block in tower.modules():
            if isinstance(block, Block):
                block.settle()
        return tower

    return built


@pytest.fixture
def section() -> Callable[[Any], ConfigFile]:
    """A transformers configuration as the section of a config.json, as transformers saves it."""
    return lambda config: ConfigFile(config.to_diff_dict(), Path("config.json"), "vision_config.")


@pytest.fixture
def randomised() -> Callable[[nn.Module], nn.Module]:
    """No parameter of a reference stays zero or one, where a mistake would not show."""

    def fresh(module: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        for parameter in module.parameters():
            parameter.data.normal_(0, 0.3 if parameter.ndim > 1 else 0.5)
        return module.eval()

    return fresh
