"""A tower as a part of a whole model, built by the passes that build every model."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from bestiary import model
from bestiary.blocks import Attention, Decoder, Embedding, Encoder, GatedMLP, Head, Layer, Layers, RMSNorm, Rope
from bestiary.blocks.leaf import Block
from bestiary.checkpoint import Checkpoint, ConfigFile, Names
from bestiary.parallel import Mesh
from bestiary.testing.tiny import tiny_checkpoint
from bestiary_towers import clip

WIDTH = 64
VISION = CLIPVisionConfig(
    hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=8
)


class Pictures(Encoder):
    """As a plugin would write it."""

    def __init__(self, tower: Block) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, modality: str, inputs: Mapping[str, Tensor]) -> Tensor:
        found: Tensor = self.tower(inputs["pixels"]).flatten(0, 1)
        return found


def describe(vocabulary: int) -> Decoder:
    def layer(i: int) -> Layer:
        return Layer(
            mix_norm=RMSNorm(WIDTH, 1e-5),
            mixer=Attention(WIDTH, heads=4, kv_heads=2, head_dim=16, rope=Rope(16, base=10000.0)),
            ffn_norm=RMSNorm(WIDTH, 1e-5),
            ffn=GatedMLP(WIDTH, 128),
        )

    section = ConfigFile(VISION.to_diff_dict(), Path("config.json"), "vision_config.")
    return Decoder(
        embed=Embedding(vocabulary, WIDTH),
        encoder=Pictures(clip.describe(clip.Config.read(section), features=(-2,))),
        layers=Layers(2, layer),
        norm=RMSNorm(WIDTH, 1e-5),
        head=Head(vocabulary, WIDTH),
        context=64,
    )


TEXT = Names(
    ("embed_tokens", "embed"),
    ("layers.*.input_layernorm", "layers.*.mix_norm"),
    *((f"layers.*.self_attn.{part}_proj", f"layers.*.mixer.qkv[{part}]") for part in "qkv"),
    ("layers.*.self_attn.o_proj", "layers.*.mixer.out"),
    ("layers.*.post_attention_layernorm", "layers.*.ffn_norm"),
    *((f"layers.*.mlp.{part}_proj", f"layers.*.ffn.gate_up[{part}]") for part in ("gate", "up")),
    ("layers.*.mlp.down_proj", "layers.*.ffn.down"),
    ("norm", "norm"),
)
NAMES = TEXT.under("model.", "") + Names(("lm_head", "head")) + clip.NAMES.under("vision_tower.", "encoder.tower.")


def test_a_whole_model_is_built_with_its_tower(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = CLIPVisionModel(VISION).eval()
    folder = tiny_checkpoint(tmp_path / "m", "X", hidden=WIDTH, layers=2, tied=False)
    weights = load_file(folder / "model.safetensors")
    save_file(
        weights | {f"vision_tower.vision_model.{k}": v for k, v in reference.state_dict().items()},
        folder / "model.safetensors",
    )
    vocabulary = weights["lm_head.weight"].shape[0]
    cpu = torch.device("cpu")
    with Checkpoint.open(folder) as checkpoint:
        built = model.build(describe(vocabulary), NAMES, checkpoint, dtype=torch.float32, device=cpu, length=64)
        # The last stage of two has no tower, and passes over its tensors.
        last = model.build(
            describe(vocabulary), NAMES, checkpoint, dtype=torch.float32, device=cpu, length=64, mesh=Mesh(1, 2)
        )
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = reference(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
    torch.testing.assert_close(built.encoder("image", {"pixels": pixels}), expected, atol=1e-4, rtol=1e-4)  # type: ignore[misc]
    assert not hasattr(last, "encoder")
