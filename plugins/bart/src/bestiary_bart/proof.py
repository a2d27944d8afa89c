"""What proves BART: small configurations as published, and the class that knows the answer."""

from bestiary.testing import Case, Naming, Transformers

__all__ = ["CASES"]

PUBLISHED = {
    "model_type": "bart",
    "vocab_size": 96,
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 160,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
    "activation_function": "gelu",
    "scale_embedding": False,
    "decoder_start_token_id": 2,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "is_encoder_decoder": True,
    "torch_dtype": "float32",
}
REFERENCE = Transformers("BartForConditionalGeneration", kind="encoder-decoder")
DOUBLED = tuple(("model.shared.weight", f"model.{side}.embed_tokens.weight") for side in ("encoder", "decoder"))

CASES = (
    Case(
        "large",
        PUBLISHED,
        REFERENCE,
        mutations={"the activation": {"activation_function": "relu"}, "the scale": {"scale_embedding": True}},
        namings=(
            Naming("old files repeat the table", repeats=(*DOUBLED, ("model.shared.weight", "lm_head.weight"))),
            Naming("without the first level", ((r"^model\.", ""),)),
        ),
    ),
    Case(
        "scaled",
        {
            **PUBLISHED,
            "scale_embedding": True,
            "activation_function": "relu",
            "decoder_layers": 1,
            "decoder_start_token_id": 5,
        },
        REFERENCE,
        mutations={"the scale": {"scale_embedding": False}, "how an answer begins": {"decoder_start_token_id": 2}},
    ),
)
