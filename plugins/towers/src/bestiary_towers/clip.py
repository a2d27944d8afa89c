"""CLIP's vision tower (Radford et al. 2021, arXiv 2103.00020): a class token, and a norm before the first layer."""

from collections.abc import Sequence
from dataclasses import dataclass

from bestiary.checkpoint import Names
from bestiary_towers.vit import LAYERS, ViT, ViTConfig

__all__ = ["NAMES", "Config", "describe"]


@dataclass(frozen=True)
class Config(ViTConfig):
    """What a vision_config says of a CLIP."""

    defaults = {  # noqa: RUF012 - a ClassVar of the base
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }


def describe(c: Config, *, features: Sequence[int] = (-1,), keep_class: bool = False) -> ViT:
    """Pictures [N, C, image size, image size] to [N, patches, width x features].

    `features` as in vision_feature_layer; `keep_class` is the selection "full": one vector more, the first.
    """
    return ViT(c, class_token=True, keep_class=keep_class, features=features, pre_norm=True)


NAMES = (
    (
        LAYERS
        + Names(
            ("embeddings.class_embedding", "class_token"),
            ("pre_layrnorm", "pre_norm"),
            ("post_layernorm", None),  # of the pooled vector, which nobody here wants
        )
    )
    .under("vision_model.", "")
    .optional("vision_model.")
)
