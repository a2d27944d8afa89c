"""What proves Ultravox: small configurations of its two generations, and prompts with recordings."""

from collections.abc import Sequence

from bestiary.testing import Case, Sample, sound
from bestiary_ultravox.oracle import Ultravox

__all__ = ["CASES", "LATER", "PUBLISHED", "samples"]

AUDIO, END = 90, 91
WHISPER = {
    "model_type": "whisper",
    "architectures": ["WhisperForConditionalGeneration"],
    "d_model": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 96,
    "num_mel_bins": 80,
    "max_source_positions": 20,
    "activation_function": "gelu",
}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": END,
    "tie_word_embeddings": False,
}
#: As up to 0.4.1; LATER, as from 0.5 on.
PUBLISHED = {
    "model_type": "ultravox",
    "vocab_size": 96,
    "hidden_size": 96,
    "stack_factor": 8,
    "norm_init": 0.4,
    "projector_act": "swiglu",
    "audio_token_index": AUDIO,
    "text_config": LLAMA,
    "audio_config": WHISPER,
    "torch_dtype": "float32",
}
LATER = {**PUBLISHED, "projector_ln_mid": True, "audio_latency_block_size": None}
QWEN2 = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
#: The states of the tower that `samples` make: 17; 10 and 13; 20, 20 and 7 (of 13 frames); none.
LENGTHS = ((5380,), (3300, 4100), (14700,), ())


def samples() -> Sequence[Sample]:
    """One recording; two; one of three windows at the very end, behind a token as those that it becomes; none."""
    return tuple(
        Sample(ids, {"audio": [(sound(length, length), 16000) for length in lengths]} if lengths else {})
        for ids, lengths in zip(PROMPTS, LENGTHS, strict=True)
    )


PROMPTS = (
    (1, 17, AUDIO, 5, 6, 7, 8, 9),
    (1, AUDIO, 11, AUDIO, 12),
    (1, 40, END, 41, AUDIO),
    (1, 50, 51, 52, 53, 54),
)


CASES = (
    Case(
        "up to 0.4.1: a norm at the end",
        PUBLISHED,
        Ultravox(),
        samples=samples,
        mutations={
            "the norm's place": {"projector_ln_mid": True},
            "the stack": {"stack_factor": 4},
            "frames that are cut": {"audio_latency_block_size": 0},
        },
    ),
    Case(
        "from 0.5 on: a norm in the middle",
        LATER,
        Ultravox(),
        samples=samples,
        mutations={
            "the norm's place": {"projector_ln_mid": None},
            "the tower's activation": {"audio_config": {**WHISPER, "activation_function": "relu"}},
            "positions of the tower": {"audio_config": {**WHISPER, "max_source_positions": 24}},
        },
    ),
    Case(
        "another language model, tied, and a stack of three",
        {**LATER, "text_config": QWEN2, "stack_factor": 3, "hidden_size": 64},
        Ultravox(),
        samples=samples,
        mutations={"the base": {"text_config": {**QWEN2, "rope_theta": 100.0}}},
    ),
)
