"""What proves PaliGemma: small configurations of both generations; transformers makes pixels and numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bestiary.testing import Case, Naming, Sample, Transformers, never, picture

__all__ = ["CASES"]

IMAGE, PATCHES = 90, 9
GEMMA = {
    "model_type": "gemma",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
    "projection_dim": 128,
    "num_image_tokens": PATCHES,
}
PUBLISHED = {
    "model_type": "paligemma",
    "image_token_index": IMAGE,
    "hidden_size": 128,
    "projection_dim": 128,
    "text_config": GEMMA,
    "vision_config": SIGLIP,
    "torch_dtype": "float32",
}
STEPS = {"size": {"height": 24, "width": 24}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}


def _samples() -> Sequence[Sample]:
    return (
        Sample((IMAGE, 2, 17, 5, 6, 7, 8, 9, 30), {"image": [picture(1, 40, 20)]}),
        Sample((2, 11, 12, 13), {"image": [picture(2, 18, 33)]}),
        Sample((2, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50)),
        Sample((2, 60), {"image": [picture(3, 24, 24)]}),
    )


def _feed(sample: Sample, answer: Sequence[int]) -> Mapping[str, Any]:
    import torch
    from transformers import SiglipImageProcessorPil

    images = list(sample.media.get("image", ()))
    ids = [*[IMAGE] * PATCHES * len(images), *(token for token in sample.token_ids if token != IMAGE)]
    found: dict[str, Any] = {
        "input_ids": torch.tensor([[*ids, *answer]]),
        "token_type_ids": torch.tensor([[0] * len(ids) + [1] * len(answer)]),
    }
    if images:
        settings: dict[str, Any] = dict(STEPS)
        found["pixel_values"] = SiglipImageProcessorPil(**settings)(images, return_tensors="pt")["pixel_values"]
    return found


REFERENCE = Transformers("PaliGemmaForConditionalGeneration", feed=_feed, weights=never(IMAGE))
TOWER = (r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.")
NAMINGS = (
    Naming("as published", (TOWER,)),
    Naming(
        "4.52",
        (
            TOWER,
            (r"^vision_tower\.", "model.vision_tower."),
            (r"^multi_modal_projector\.", "model.multi_modal_projector."),
            (r"^language_model\.model\.", "model.language_model."),
        ),
    ),
)

CASES = (
    Case(
        "1: Gemma",
        PUBLISHED,
        REFERENCE,
        mutations={
            "the text's epsilon": {"text_config": {**GEMMA, "rms_norm_eps": 0.5}},
            "the tower's epsilon": {"vision_config": {**SIGLIP, "layer_norm_eps": 0.5}},
            "the placeholder": {"image_token_index": 7},
        },
        namings=NAMINGS,
        samples=_samples,
        files={"preprocessor_config.json": STEPS},
    ),
    Case(
        "a head of its own, which the whole model's part tells of",
        {**PUBLISHED, "tie_word_embeddings": False},
        REFERENCE,
        mutations={"that it is its own": {"tie_word_embeddings": True}},
        samples=_samples,
        files={"preprocessor_config.json": STEPS},
    ),
    Case(
        "2: Gemma 2, whose windows are shorter than a picture",
        {
            **PUBLISHED,
            "text_config": {
                **GEMMA,
                "model_type": "gemma2",
                "sliding_window": 6,
                "query_pre_attn_scalar": 32,
                "attn_logit_softcapping": 3.0,
                "final_logit_softcapping": 5.0,
            },
        },
        replace(REFERENCE, since=("5.23", "the text's final_logit_softcapping")),
        mutations={"what the text is": {"text_config": GEMMA}},
        samples=_samples,
        files={"preprocessor_config.json": STEPS},
    ),
)
