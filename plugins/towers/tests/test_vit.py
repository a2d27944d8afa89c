"""CLIP and SigLIP beside transformers' classes: every feature layer, and all three generations of tensor names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from bestiary.blocks.leaf import Block
from bestiary.checkpoint import ConfigFile, Names
from bestiary.errors import ConfigUnsupported, TensorMismatch
from bestiary_towers import clip, siglip

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 21,  # three patches and a rest that no patch covers
    "patch_size": 6,
}
Build = Callable[..., Block]
Section = Callable[[Any], ConfigFile]
Randomised = Callable[[nn.Module], nn.Module]

KINDS = {
    "clip": (clip, CLIPVisionConfig(**SIZES), CLIPVisionModel),
    "siglip": (siglip, SiglipVisionConfig(**SIZES), SiglipVisionModel),
    "siglip without a head": (siglip, SiglipVisionConfig(**SIZES, vision_use_head=False), SiglipVisionModel),
}


def weights(reference: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in reference.state_dict().items()}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, section: Section, randomised: Randomised) -> tuple[Any, Any, nn.Module]:
    """The module, its configuration read back, and the reference."""
    module, config, reference = KINDS[request.param]
    return module, module.Config.read(section(config)), randomised(reference(config))


@pytest.mark.parametrize("features", [(-1,), (-2,), (0,), (3,), (-2, -4, 1), (-3, -3)])
def test_features_are_the_references_hidden_states_side_by_side(
    kind: tuple[Any, Any, nn.Module], features: tuple[int, ...], build: Build
) -> None:
    module, config, reference = kind
    pixels = torch.randn(3, 3, 21, 21)
    with torch.no_grad():
        states = reference(pixels, output_hidden_states=True).hidden_states
        tower = build(module.describe(config, features=features), module.NAMES, weights(reference, ""))
        found = tower(pixels)
    expected = torch.cat([states[feature] for feature in features], -1)
    expected = expected[:, expected.shape[1] - config.grid**2 :]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_whole_of_clip_has_its_class_token_first(section: Section, randomised: Randomised, build: Build) -> None:
    module, config, make = KINDS["clip"]
    reference = randomised(make(config))
    pixels = torch.randn(2, 3, 21, 21)
    tower = module.describe(module.Config.read(section(config)), keep_class=True)
    with torch.no_grad():
        found = build(tower, module.NAMES, weights(reference, ""))(pixels)
        expected = reference(pixels).last_hidden_state
    assert found.shape == (2, 10, 32)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_siglip_gives_its_normed_output_too(section: Section, randomised: Randomised, build: Build) -> None:
    module, config, make = KINDS["siglip"]
    reference = randomised(make(config))
    pixels = torch.randn(2, 3, 21, 21)
    tower = module.describe(module.Config.read(section(config)), normed=True)
    with torch.no_grad():
        found = build(tower, module.NAMES, weights(reference, ""))(pixels)
        expected = reference(pixels).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prefix", ["vision_tower.vision_model.", "model.vision_tower.vision_model.", "vision_tower."])
def test_all_three_generations_of_names_fill_the_tower(
    kind: tuple[Any, Any, nn.Module], prefix: str, build: Build
) -> None:
    module, config, reference = kind
    pixels = torch.randn(1, 3, 21, 21)
    names: Names = module.NAMES.under("model.vision_tower.", "").optional("model.")
    stored = weights(reference, prefix)
    stored[f"{prefix}embeddings.position_ids"] = torch.arange(9)[None]  # a buffer that old files have
    with torch.no_grad():
        found = build(module.describe(config), names, stored)(pixels)
        expected = reference(pixels, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found, expected[:, -9:], atol=1e-4, rtol=1e-4)


def test_a_picture_is_not_changed_by_those_beside_it(kind: tuple[Any, Any, nn.Module], build: Build) -> None:
    module, config, reference = kind
    tower = build(module.describe(config), module.NAMES, weights(reference, ""))
    pixels = torch.randn(3, 3, 21, 21)
    spoilt = pixels.clone()
    spoilt[[0, 2]] = torch.nan
    found = tower(spoilt)
    assert found[[0, 2]].isnan().all()
    torch.testing.assert_close(found[1], tower(pixels[1:2])[0], atol=1e-5, rtol=1e-5)


def test_the_stream_that_is_tapped_is_not_written_to_by_later_layers(
    kind: tuple[Any, Any, nn.Module], build: Build
) -> None:
    module, config, reference = kind
    pixels = torch.randn(1, 3, 21, 21)
    alone = build(module.describe(config, features=(1,)), module.NAMES, weights(reference, ""))(pixels)
    both = build(module.describe(config, features=(1, 4)), module.NAMES, weights(reference, ""))(pixels)
    assert torch.equal(both[..., : config.width], alone)


def test_a_tower_runs_in_bfloat16_near_what_it_gives_in_float32(kind: tuple[Any, Any, nn.Module], build: Build) -> None:
    module, config, reference = kind
    for parameter in reference.parameters():
        parameter.data.mul_(0.3)
    pixels = torch.randn(2, 3, 21, 21)
    exact = build(module.describe(config), module.NAMES, weights(reference, ""))(pixels)
    rounded = build(module.describe(config), module.NAMES, weights(reference, ""), torch.bfloat16)(pixels)
    assert rounded.dtype is torch.bfloat16
    assert torch.nn.functional.cosine_similarity(rounded.float(), exact, dim=-1).min() > 0.999


@pytest.mark.parametrize("features", [(5,), (-6,), ()])
def test_a_feature_layer_that_the_tower_has_not_is_refused(features: tuple[int, ...], section: Section) -> None:
    module, config, _ = KINDS["clip"]
    with pytest.raises(ConfigUnsupported, match="the tower has 4 layers"):
        module.describe(module.Config.read(section(config)), features=features)


def test_a_patch_of_another_shape_is_refused_though_it_has_as_many_numbers(
    kind: tuple[Any, Any, nn.Module], build: Build
) -> None:
    module, config, reference = kind
    stored = weights(reference, "")
    name = "embeddings.patch_embedding.weight"
    stored[name] = stored[name].reshape(32, 6, 3, 6)
    with pytest.raises(TensorMismatch, match="patch_embedding"):
        build(module.describe(config), module.NAMES, stored)


def test_what_the_file_leaves_out_is_as_in_transformers(section: Section) -> None:
    for module, config in ((clip, CLIPVisionConfig()), (siglip, SiglipVisionConfig())):
        assert module.Config.read(section(config)) == module.Config.read(
            ConfigFile(config.to_dict(), Path("config.json"))
        )


def test_sizes_that_do_not_fit_are_refused(section: Section) -> None:
    with pytest.raises(ConfigUnsupported, match=r"vision_config\.num_attention_heads"):
        clip.Config.read(ConfigFile({**SIZES, "hidden_size": 30}, Path("config.json"), "vision_config."))
    with pytest.raises(ConfigUnsupported, match=r"vision_config\.hidden_act"):
        siglip.Config.read(section(SiglipVisionConfig(**SIZES, hidden_act="silu")))
