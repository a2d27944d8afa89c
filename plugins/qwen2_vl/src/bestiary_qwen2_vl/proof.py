"""What proves Qwen2-VL: small configurations; transformers makes patches, positions and numbers."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from bestiary.testing import Case, Naming, Sample, Transformers, film, never, picture

__all__ = ["CASES"]

START, END, IMAGE, VIDEO = 90, 91, 92, 93
PATCH, MERGE = 8, 2
VISION = {
    "depth": 2,
    "embed_dim": 64,
    "num_heads": 2,
    "mlp_ratio": 2,
    "in_chans": 3,
    "hidden_size": 128,
    "patch_size": PATCH,
    "spatial_patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
}
PUBLISHED = {
    "model_type": "qwen2_vl",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    "use_sliding_window": False,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_config": VISION,
    "torch_dtype": "float32",
}
STEPS = {
    "min_pixels": 16 * 16,
    "max_pixels": 48 * 48,
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def _samples() -> Sequence[Sample]:
    image, video = (START, IMAGE, END), (START, VIDEO, END)
    wide, tall = picture(1, 70, 30), picture(2, 18, 44)
    return (
        Sample((1, *image, 5, 6, *video, 7, 8, 9), {"image": [wide], "video": [film(4, 3, 48, 32)]}),
        Sample((1, *image, *image, 11, 12), {"image": [tall, wide]}),
        Sample((*video, 20, *video), {"video": [film(5, 4, 32, 48), film(6, 1, 32, 32)]}),
        Sample((1, 50, 51, 52, 53, 54)),
    )


def _feed(sample: Sample, answer: Sequence[int]) -> Mapping[str, Any]:
    import torch
    from transformers import Qwen2VLImageProcessorPil

    settings: dict[str, Any] = dict(STEPS)
    make = Qwen2VLImageProcessorPil(**settings)

    def patches(image: Any) -> tuple[torch.Tensor, torch.Tensor]:
        made = make([image], return_tensors="pt")
        return made["pixel_values"], made["image_grid_thw"][0]

    def moving(frames: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Two frames share a patch; a still picture's patch holds it twice, so half of each of two is taken."""
        still = [patches(frame) for frame in (*frames, frames[-1])]
        halves = [found.view(len(found), 3, 2, -1)[:, :, :1] for found, _ in still]
        pairs = [torch.cat(pair, 2).flatten(1) for pair in list(pairwise(halves))[: len(frames)][::2]]
        return torch.cat(pairs), torch.tensor([len(pairs), *still[0][1][1:].tolist()])

    images = [patches(image) for image in sample.media.get("image", ())]
    videos = [moving(frames) for frames in sample.media.get("video", ())]
    counts = {
        token: iter([int(grid.prod()) // MERGE**2 for _, grid in found])
        for token, found in ((IMAGE, images), (VIDEO, videos))
    }
    ids = [i for token in sample.token_ids for i in [token] * (next(counts[token]) if token in counts else 1)]
    given = torch.tensor([[*ids, *answer]])
    found: dict[str, Any] = {"input_ids": given}
    if images or videos:
        found["mm_token_type_ids"] = (given == IMAGE).int() + 2 * (given == VIDEO).int()
    if images:
        found["pixel_values"] = torch.cat([one for one, _ in images])
        found["image_grid_thw"] = torch.stack([grid for _, grid in images])
    if videos:
        found["pixel_values_videos"] = torch.cat([one for one, _ in videos])
        found["video_grid_thw"] = torch.stack([grid for _, grid in videos])
    return found


def _ready(items: Sequence[Any], vectors: Sequence[Any]) -> Mapping[str, Any]:
    import torch

    found = {}
    for name in {item.modality for item in items}:
        own = [i for i, item in enumerate(items) if item.modality == name]
        found[name] = {
            f"{name}_embeds": torch.cat([vectors[i] for i in own]),
            f"{name}_grid_thw": torch.stack([items[i].tensors["grid"] for i in own]),
        }
    return found


REFERENCE = Transformers("Qwen2VLForConditionalGeneration", feed=_feed, weights=never(IMAGE, VIDEO), attention="sdpa")
NAMINGS = (Naming("4.52", ((r"^visual\.", "model.visual."), (r"^model\.(?!visual)", "model.language_model."))),)

CASES = (
    Case(
        "7B",
        PUBLISHED,
        REFERENCE,
        mutations={
            "the axes": {"rope_scaling": None},
            "their shares": {"rope_scaling": {"type": "mrope", "mrope_section": [6, 6, 4]}},
            "the base": {"rope_theta": 100.0},
            "the tower's heads": {"vision_config": {**VISION, "num_heads": 4}},
            "the norms' epsilon": {"rms_norm_eps": 0.5},
        },
        namings=NAMINGS,
        samples=_samples,
        files={"preprocessor_config.json": STEPS},
        embeddings=_ready,
    ),
    Case(
        "2B: tied",
        {**PUBLISHED, "tie_word_embeddings": True},
        REFERENCE,
        mutations={"the axes": {"rope_scaling": None}},
        namings=NAMINGS,
        samples=_samples,
        files={"preprocessor_config.json": STEPS},
        embeddings=_ready,
    ),
    Case(
        "what files may leave out",
        {key: value for key, value in PUBLISHED.items() if key not in ("rope_theta", "rms_norm_eps")},
        REFERENCE,
        mutations={"the base": {"rope_theta": 10000.0}, "the norms' epsilon": {"rms_norm_eps": 1e-2}},
        samples=_samples,
        files={"preprocessor_config.json": STEPS},
        embeddings=_ready,
    ),
)
