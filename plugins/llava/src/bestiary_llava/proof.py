"""What proves LLaVA: each tower beside a language model, small; transformers makes pixels and numbers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bestiary.testing import Case, Naming, Sample, Transformers, never, picture

__all__ = ["CASES"]

IMAGE, BREAK, END = 90, 91, 92
CLIP_COLOURS = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
}
PUBLISHED = {
    "model_type": "llava",
    "image_token_index": IMAGE,
    "image_seq_length": 9,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "text_config": LLAMA,
    "vision_config": CLIP,
    "torch_dtype": "float32",
}
CLIP_FILE = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}, "do_center_crop": True}
SIGLIP_FILE = {"size": {"height": 24, "width": 24}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PIXTRAL_FILE = {"size": {"longest_edge": 40}, "patch_size": {"height": 8, "width": 8}, **CLIP_COLOURS}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [
        {"id": id, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": True}
        for id, text in ((IMAGE, "[IMG]"), (BREAK, "[IMG_BREAK]"), (END, "[IMG_END]"))
    ],
    "model": {"type": "WordLevel", "unk_token": "w0", "vocab": {f"w{i}": i for i in range(90)}},
}


def _samples() -> Sequence[Sample]:
    """One picture, two of other shapes, one at the very end, none."""
    wide, tall, square = picture(1, 40, 20), picture(2, 18, 33), picture(3, 30, 30)
    return (
        Sample((1, 17, IMAGE, 5, 6, 7, 8, 9), {"image": [wide]}),
        Sample((1, IMAGE, 11, IMAGE, 12), {"image": [square, tall]}),
        Sample((1, 40, 41, 42, IMAGE), {"image": [tall]}),
        Sample((1, 50, 51, 52, 53, 54)),
    )


Feed = Callable[[Sample, Sequence[int]], Mapping[str, Any]]


def _fed(processor: str, settings: Mapping[str, Any], vectors: int) -> Feed:
    """Pixels of transformers' processor of that name, and the placeholder once for each vector."""

    def feed(sample: Sample, answer: Sequence[int]) -> Mapping[str, Any]:
        import torch
        import transformers

        ids = [i for token in sample.token_ids for i in ([token] * vectors if token == IMAGE else [token])]
        found: dict[str, Any] = {"input_ids": torch.tensor([[*ids, *answer]])}
        if images := sample.media.get("image"):
            made = getattr(transformers, processor)(**settings)(list(images), return_tensors="pt")
            found["pixel_values"] = made["pixel_values"]
        return found

    return feed


def _feed_pixtral(sample: Sample, answer: Sequence[int]) -> Mapping[str, Any]:
    """As `_fed`, with a token after each row of patches."""
    import torch
    from transformers import PixtralImageProcessorPil

    images = list(sample.media.get("image", ()))
    if not images:
        return {"input_ids": torch.tensor([[*sample.token_ids, *answer]])}
    settings: dict[str, Any] = dict(PIXTRAL_FILE)
    made = PixtralImageProcessorPil(**settings)(images, return_tensors="pt")
    sizes = iter(made["image_sizes"].tolist())
    ids: list[int] = []
    for token in sample.token_ids:
        if token == IMAGE:
            height, width = next(sizes)
            rows = ([IMAGE] * (width // 8) + [BREAK]) * (height // 8)
            ids += [*rows[:-1], END]
        else:
            ids.append(token)
    return {"input_ids": torch.tensor([[*ids, *answer]]), **made}


def _sized(items: Sequence[Any], vectors: Sequence[Any]) -> Mapping[str, Any]:
    """Ready embeddings in the form that says how many rows a picture has."""
    import torch

    sizes = [list(item.tensors["pixels"].shape[1:]) for item in items]
    return {"image": {"image_embeds": torch.cat(list(vectors)), "image_sizes": torch.tensor(sizes)}}


def _later(*more: tuple[str, str]) -> Naming:
    """Of transformers 4.52 to 4.57, from what the class saves."""
    moved = ("vision_tower", "model.vision_tower"), ("multi_modal_projector", "model.multi_modal_projector")
    text = ("language_model.lm_head", "lm_head"), ("language_model.model", "model.language_model")
    return Naming("4.52", (*more, *((rf"^{old}\.", f"{new}.") for old, new in (*moved, *text))))


FIRST = (r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.")

PIXTRAL = {**CLIP, "model_type": "pixtral", "image_size": 40, "rope_theta": 10000.0}


def _reference(feed: Feed) -> Transformers:
    """LLaVA's own class."""
    return Transformers("LlavaForConditionalGeneration", feed=feed, weights=never(IMAGE))


CASES = (
    Case(
        "1.5: CLIP and Llama",
        PUBLISHED,
        _reference(_fed("CLIPImageProcessorPil", CLIP_FILE, 9)),
        mutations={
            "the layer": {"vision_feature_layer": -1},
            "the class token": {"vision_feature_select_strategy": "full"},
            "the text's epsilon": {"text_config": {**LLAMA, "rms_norm_eps": 0.5}},
            "the tower's epsilon": {"vision_config": {**CLIP, "layer_norm_eps": 0.5}},
        },
        namings=(Naming("as published", (FIRST,)), _later(FIRST)),
        samples=_samples,
        files={"preprocessor_config.json": {**CLIP_FILE, **CLIP_COLOURS}},
    ),
    Case(
        "several layers, with the class token",
        {
            **PUBLISHED,
            "vision_feature_layer": [-3, -1],
            "vision_feature_select_strategy": "full",
            "multimodal_projector_bias": False,
            "image_seq_length": 10,
        },
        _reference(_fed("CLIPImageProcessorPil", CLIP_FILE, 10)),
        mutations={"the layers": {"vision_feature_layer": [-2, -1]}},
        samples=_samples,
        files={"preprocessor_config.json": {**CLIP_FILE, **CLIP_COLOURS}},
    ),
    Case(
        "SigLIP and Qwen2",
        {
            **PUBLISHED,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "text_config": {**LLAMA, "model_type": "qwen2"},
            "tie_word_embeddings": True,
            "vision_config": {**CLIP, "model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"},
        },
        _reference(_fed("SiglipImageProcessorPil", SIGLIP_FILE, 9)),
        mutations={"the layer": {"vision_feature_layer": -2}},
        namings=(Naming("as published", (FIRST,)), _later(FIRST)),
        samples=_samples,
        files={"preprocessor_config.json": SIGLIP_FILE},
    ),
    Case(
        "Pixtral and Mistral",
        {
            **PUBLISHED,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "text_config": {**LLAMA, "model_type": "mistral", "head_dim": 48, "sliding_window": None},
            "vision_config": PIXTRAL,
        },
        _reference(_feed_pixtral),
        mutations={"the patches": {"vision_config": {**PIXTRAL, "patch_size": 4}}},
        namings=(_later(),),
        samples=_samples,
        files={"preprocessor_config.json": PIXTRAL_FILE, "tokenizer.json": TOKENIZER},
        embeddings=_sized,
    ),
)
