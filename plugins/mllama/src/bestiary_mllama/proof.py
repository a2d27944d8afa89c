"""What proves Llama 3.2 Vision: small configurations; transformers makes tiles, masks and numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from bestiary.testing import Case, Naming, Sample, Transformers, picture

__all__ = ["CASES"]

VOCABULARY = 96
IMAGE = VOCABULARY
TEXT = {
    "model_type": "mllama_text_model",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "cross_attention_layers": [1, 3],
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "model_type": "mllama_vision_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_global_layers": 2,
    "attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "max_num_tiles": 4,
    "intermediate_layers_indices": [0, 2],
    "vision_output_dim": 192,
    "norm_eps": 1e-5,
}
PUBLISHED = {
    "model_type": "mllama",
    "image_token_index": IMAGE,
    "text_config": TEXT,
    "vision_config": VISION,
    "torch_dtype": "float32",
}
STEPS = {
    "size": {"height": 16, "width": 16},
    "max_image_tiles": 4,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def _samples() -> Sequence[Sample]:
    """A picture after some text, one before all of it, one that fills all tiles, none."""
    return (
        Sample((1, 17, 5, IMAGE, 6, 7, 8, 9), {"image": [picture(1, 40, 12)]}),
        Sample((IMAGE, 1, 11, 12, 13), {"image": [picture(2, 14, 15)]}),
        Sample((1, IMAGE, 40, 41), {"image": [picture(3, 60, 50)]}),
        Sample((1, 50, 51, 52, 53, 54)),
    )


def _feed(sample: Sample, answer: Sequence[int]) -> Mapping[str, Any]:
    import torch
    from transformers import MllamaImageProcessorPil
    from transformers.models.mllama import processing_mllama as reference

    ids = [*sample.token_ids, *answer]
    images = list(sample.media.get("image", ()))
    if not images:
        return {"input_ids": torch.tensor([ids])}
    settings: dict[str, Any] = dict(STEPS)
    made = MllamaImageProcessorPil(**settings)(images, return_tensors="pt")
    tokens = reference.get_cross_attention_token_mask(list(sample.token_ids), IMAGE)
    mask = reference.convert_sparse_cross_attention_mask_to_dense([tokens], made["num_tiles"], 4, len(sample.token_ids))
    shown = torch.from_numpy(mask)
    grown = torch.cat((shown, shown[:, -1:].expand(-1, len(answer), -1, -1)), 1)  # an answer sees what its prompt saw
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    return {"input_ids": torch.tensor([ids]), "cross_attention_mask": grown, **{name: made[name] for name in names}}


def _open(tensors: dict[str, Any]) -> dict[str, Any]:
    """Every gate wide enough to see what is behind it."""
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        if "gate" in name and "gate_proj" not in name:
            tensor.fill_(0.4 + 0.1 * (number % 5))
    return tensors


REFERENCE = Transformers("MllamaForConditionalGeneration", feed=_feed, weights=_open)
NAMINGS = (
    Naming(
        "4.52",
        (
            (r"^vision_model\.", "model.vision_model."),
            (r"^multi_modal_projector\.", "model.multi_modal_projector."),
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^language_model\.model\.", "model.language_model."),
        ),
    ),
)

CASES = (
    Case(
        "11B",
        PUBLISHED,
        REFERENCE,
        mutations={
            "the layers that are looked into": {"vision_config": {**VISION, "intermediate_layers_indices": [0, 1]}},
            "the tower's epsilon": {"vision_config": {**VISION, "norm_eps": 0.5}},
            "the text's epsilon": {"text_config": {**TEXT, "rms_norm_eps": 0.5}},
            "which layers look": {"text_config": {**TEXT, "cross_attention_layers": [0, 3]}},
            "the placeholder": {"image_token_index": 7},
        },
        namings=NAMINGS,
        samples=_samples,
        files={"preprocessor_config.json": STEPS},
    ),
    Case(
        "stretched positions, a layer that looks last",
        {
            **PUBLISHED,
            "text_config": {
                **TEXT,
                "cross_attention_layers": [2],
                "num_hidden_layers": 3,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
            },
        },
        REFERENCE,
        mutations={"the stretch": {"text_config": {**TEXT, "cross_attention_layers": [2], "num_hidden_layers": 3}}},
        namings=NAMINGS,
        samples=_samples,
        files={"preprocessor_config.json": STEPS},
    ),
)
