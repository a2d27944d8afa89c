"""Mixtral, as data: nothing here imports a model, or torch."""

from bestiary.architecture import Architecture, Task

__all__ = ["MIXTRAL"]

MIXTRAL = Architecture(
    name="MixtralForCausalLM",
    model="bestiary_mixtral.mixtral",
    proof="bestiary_mixtral.proof",
    tasks={Task.GENERATE},
    lora=True,
    pipeline=True,
    tensor=True,
    examples=("mistralai/Mixtral-8x7B-Instruct-v0.1", "mistralai/Mixtral-8x22B-v0.1"),
)
