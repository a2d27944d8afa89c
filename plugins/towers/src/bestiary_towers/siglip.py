"""SigLIP's vision tower for pictures of one size (Zhai et al. 2023, arXiv 2303.15343): patches alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from bestiary.checkpoint import Names
from bestiary_towers.vit import LAYERS, ViT, ViTConfig

__all__ = ["NAMES", "Config", "describe"]


@dataclass(frozen=True)
class Config(ViTConfig):
    """What a vision_config says of a SigLIP."""

    defaults = {  # noqa: RUF012 - a ClassVar of the base
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }


def describe(c: Config, *, features: Sequence[int] = (-1,), normed: bool = False) -> ViT:
    """Pictures [N, C, image size, image size] to [N, patches, width x features].

    `features` as in vision_feature_layer, which are taken before the last norm; `normed` is the tower's own output,
    after it.
    """
    return ViT(c, class_token=False, features=features, patch_bias=True, post_norm=True, normed=normed)


NAMES = (
    (
        LAYERS
        + Names(
            ("post_layernorm", "post_norm"),
            # The head that pools all patches into one vector.
            ("head.probe", None),
            ("head.attention.in_proj_weight", None),
            ("head.attention.in_proj_bias", None),
            ("head.attention.out_proj", None),
            ("head.layernorm", None),
            ("head.mlp.fc1", None),
            ("head.mlp.fc2", None),
        )
    )
    .under("vision_model.", "")
    .optional("vision_model.")
)
