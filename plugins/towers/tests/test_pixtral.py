"""Pixtral's tower beside transformers' class: pictures of several sizes in one call, and both layouts of its files."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PixtralVisionConfig, PixtralVisionModel

from bestiary.blocks.leaf import Block
from bestiary.checkpoint import ConfigFile
from bestiary.errors import ConfigUnsupported
from bestiary_towers import pixtral

Build = Callable[..., Block]
Section = Callable[[Any], ConfigFile]

HEADS, WIDTH = 2, 32
CONFIG = PixtralVisionConfig(
    hidden_size=WIDTH,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=HEADS,
    image_size=48,
    patch_size=4,
    hidden_act="silu",
)
#: In pixels: square, wide, high, a single patch.
SIZES = [(16, 16), (8, 28), (40, 4), (4, 4)]


@pytest.fixture
def reference(randomised: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return randomised(PixtralVisionModel(CONFIG))


@pytest.fixture
def config(section: Section) -> pixtral.Config:
    return pixtral.Config.read(section(CONFIG))


@pytest.fixture
def tower(reference: nn.Module, config: pixtral.Config, build: Build) -> Block:
    stored = {f"vision_tower.{name}": tensor for name, tensor in reference.state_dict().items()}
    return build(pixtral.describe(config), pixtral.NAMES.under("vision_tower.", ""), stored)


def pictures(sizes: Sequence[tuple[int, int]] = SIZES) -> list[Tensor]:
    return [torch.randn(3, *size) for size in sizes]


def expected(reference: nn.Module, items: list[Tensor], feature: int = -1) -> Tensor:
    """The reference pads pictures to a common size, and is told their own."""
    padded = torch.zeros(len(items), 3, 40, 28)
    for into, item in zip(padded, items, strict=True):
        into[:, : item.shape[1], : item.shape[2]] = item
    sizes = torch.tensor([item.shape[1:] for item in items])
    with torch.no_grad():
        found: Tensor = reference(padded, image_sizes=sizes, output_hidden_states=True).hidden_states[feature][0]
    return found


def test_pictures_of_several_sizes_are_encoded_as_in_the_reference(reference: nn.Module, tower: Block) -> None:
    items = pictures()
    found = tower(items)
    assert found.shape == (16 + 14 + 10 + 1, WIDTH)
    torch.testing.assert_close(found, expected(reference, items), atol=1e-4, rtol=1e-4)


def test_other_layers_features_stand_side_by_side(reference: nn.Module, config: pixtral.Config, build: Build) -> None:
    items = pictures()
    tower = build(pixtral.describe(config, features=(-2, 0)), pixtral.NAMES, reference.state_dict())
    wanted = torch.cat((expected(reference, items, -2), expected(reference, items, 0)), -1)
    torch.testing.assert_close(tower(items), wanted, atol=1e-4, rtol=1e-4)


def test_a_picture_is_not_changed_by_those_beside_it(tower: Block) -> None:
    items = pictures()
    spoilt = [item if i == 1 else torch.full_like(item, torch.nan) for i, item in enumerate(items)]
    found = tower(spoilt)
    assert found.isnan().all(-1).tolist() == [True] * 16 + [False] * 14 + [True] * 11
    torch.testing.assert_close(found[16:30], tower(items[1:2]), atol=1e-5, rtol=1e-5)


def test_mistrals_own_files_give_the_same_vectors(reference: nn.Module, config: pixtral.Config, build: Build) -> None:
    """There the rows of queries and keys take turns between the halves of a head."""
    renames = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo"}
    renames |= {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    stored = {}
    for name, tensor in reference.state_dict().items():
        if ".q_proj" in name or ".k_proj" in name:
            tensor = tensor.view(HEADS, 2, -1, WIDTH).transpose(1, 2).reshape(WIDTH, WIDTH)
        for theirs, ours in renames.items():
            name = name.replace(theirs, ours)
        stored[name] = tensor
    tower = build(pixtral.describe(config, interleaved=True), pixtral.MISTRAL_NAMES, stored)
    items = pictures()
    torch.testing.assert_close(tower(items), expected(reference, items), atol=1e-4, rtol=1e-4)


def test_the_base_of_the_angles_is_read_in_both_dialects(section: Section) -> None:
    config = section(CONFIG).values
    old = {key: value for key, value in config.items() if key != "rope_parameters"} | {"rope_theta": 500.0}
    new = {**config, "rope_parameters": {"rope_type": "axial", "rope_theta": 500.0}}
    for values in (old, new):
        assert pixtral.Config.read(ConfigFile(values, section(CONFIG).path)).base == 500.0


def test_heads_that_do_not_fill_the_width_are_refused(section: Section) -> None:
    values = section(CONFIG).values
    with pytest.raises(ConfigUnsupported, match="head_dim"):
        pixtral.Config.read(ConfigFile({**values, "head_dim": 8}, section(CONFIG).path))
