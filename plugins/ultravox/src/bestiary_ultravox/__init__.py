"""Ultravox, as data: nothing here imports a model, or torch."""

from bestiary.architecture import Architecture, Modality, Task

__all__ = ["ULTRAVOX"]

ULTRAVOX = Architecture(
    name="UltravoxModel",
    model="bestiary_ultravox.ultravox",
    processor="bestiary_ultravox.processor",
    proof="bestiary_ultravox.proof",
    tasks={Task.GENERATE},
    modalities={"audio": Modality(many=True, embeddings=True)},
    lora=True,
    pipeline=True,
    tensor=True,
    examples=(
        "fixie-ai/ultravox-v0_3",
        "fixie-ai/ultravox-v0_4_1-mistral-nemo",
        "fixie-ai/ultravox-v0_5-llama-3_2-1b",
    ),
)
