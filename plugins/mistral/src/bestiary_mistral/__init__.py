"""The Mistral family, as data: nothing here imports a model, or torch."""

from bestiary.architecture import Architecture, Task

__all__ = ["MISTRAL", "MISTRAL_EMBEDDING"]

MISTRAL = Architecture(
    name="MistralForCausalLM",
    model="bestiary_mistral.mistral",
    proof="bestiary_mistral.proof",
    tasks={Task.GENERATE},
    lora=True,
    pipeline=True,
    tensor=True,
    examples=("mistralai/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-Nemo-Instruct-2407"),
)

MISTRAL_EMBEDDING = Architecture(
    name="MistralModel",
    model="bestiary_mistral.embedding",
    proof="bestiary_mistral.proof_embedding",
    tasks={Task.EMBED},
    lora=True,
    pipeline=True,
    tensor=True,
    examples=("intfloat/e5-mistral-7b-instruct",),
)
