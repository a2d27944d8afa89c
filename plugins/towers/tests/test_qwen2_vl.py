"""Qwen2-VL's tower beside transformers' class: pictures and videos of several sizes in one call."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from bestiary.blocks.leaf import Block
from bestiary.checkpoint import ConfigFile
from bestiary.errors import ConfigUnsupported
from bestiary_towers import qwen2_vl

Build = Callable[..., Block]
Section = Callable[[Any], ConfigFile]

CONFIG = Qwen2VLVisionConfig(
    depth=3, embed_dim=32, num_heads=4, hidden_size=24, mlp_ratio=3, patch_size=4, spatial_merge_size=2
)
#: A square, a wide picture, the smallest, a video of three steps.
GRIDS = torch.tensor([[1, 4, 4], [1, 2, 10], [1, 2, 2], [3, 6, 4]])
NUMBERS = 3 * 2 * 4 * 4


@pytest.fixture
def reference(randomised: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return randomised(Qwen2VisionTransformerPretrainedModel(CONFIG))


@pytest.fixture
def tower(reference: nn.Module, section: Section, build: Build) -> Block:
    stored = {f"visual.{name}": tensor for name, tensor in reference.state_dict().items()}
    names = qwen2_vl.NAMES.under("visual.", "")
    return build(qwen2_vl.describe(qwen2_vl.Config.read(section(CONFIG))), names, stored)


def patches(grids: Tensor) -> Tensor:
    return torch.randn(int(grids.prod(1).sum()), NUMBERS)


def test_pictures_and_videos_are_merged_as_in_the_reference(reference: nn.Module, tower: Block) -> None:
    x = patches(GRIDS)
    with torch.no_grad():
        expected = reference(x, grid_thw=GRIDS).pooler_output
    assert expected.shape == (len(x) // 4, 24)
    torch.testing.assert_close(tower(x, GRIDS), expected, atol=1e-4, rtol=1e-4)


def test_an_item_and_a_frame_are_not_changed_by_those_beside_them(tower: Block) -> None:
    x = patches(GRIDS)
    whole = tower(x, GRIDS)
    sizes = GRIDS.prod(1).tolist()
    for i, own in enumerate(x.split(sizes)):
        torch.testing.assert_close(tower(own, GRIDS[i : i + 1]), whole.split([n // 4 for n in sizes])[i])
    spoilt = x.clone()
    spoilt[-24:] = torch.nan  # the video's last frame
    assert torch.equal(tower(spoilt, GRIDS)[:-6], whole[:-6])


def test_the_shape_of_the_grid_matters_and_not_only_its_size(tower: Block) -> None:
    x = patches(torch.tensor([[1, 4, 4]]))
    assert (tower(x, torch.tensor([[1, 4, 4]])) - tower(x, torch.tensor([[1, 2, 8]]))).abs().max() > 1e-3


def test_a_head_that_two_axes_cannot_share_is_refused(section: Section) -> None:
    with pytest.raises(ConfigUnsupported, match=r"vision_config\.num_heads"):
        qwen2_vl.Config.read(section(Qwen2VLVisionConfig(embed_dim=24, num_heads=4)))
